"""What `torchrun` has started shares a run, not `workers.count`: it is checked before anything starts."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from poise.engine.launch import launch
from poise.engine.lifecycle import spec_hash
from poise.engine.torchrun import for_processes
from poise.env import launched_rank
from poise.errors import UserError
from poise.kinds import KINDS
from poise.kinds.align_selfplay.iterations import SelfPlay
from poise.observe.progress import Display
from poise.observe.sinks import NullSink
from poise.spec import RunSpec, load
from poise.store.runs import open_run

SELFPLAY = {
    "kind": "align.selfplay",
    "model": {"folder": "model"},
    "questions": {"name": "world", "split": "prefer"},
    "oracle": {"name": "cyclic"},
    "method": {"name": "mpo", "period": 4},
    "prompts": 3,
    "rollouts": 8,
    "sampler": {"backend": "transformers"},
    "train": {"epochs": 1},
}
CLASSIFIER = {
    "kind": "robust.train",
    "model": {"name": "cnn"},
    "data": {"name": "digits", "batch_size": 6},
    "threats": {"linf": {"eps": 0.1}},
    "objective": {"name": "at"},
    "train": {"epochs": 1},
}
TEXT = {
    "kind": "finetune.sft",
    "model": {"name": "llama"},
    "data": {"name": "world"},
    "batch_size": 6,
    "train": {"epochs": 1},
}
VAE = {"kind": "robust.vae", "data": {"name": "digits", "batch_size": 6}, "train": {"epochs": 1}}
MEASURE = {"kind": "calibrate.measure", "model": {"folder": "model"}, "questions": {"name": "world"}}
SWEEP = {
    "kind": "sweep",
    "metric": "robust/union",
    "mode": "max",
    "base": {**CLASSIFIER, "data": {"name": "digits", "batch_size": 24}},
    "space": {"data.batch_size": {"grid": [8, 6]}},
}
PIPELINE = {"kind": "pipeline", "workers": {"count": 2, "min_count": 1}, "stages": {"a": CLASSIFIER, "b": VAE}}

UNEQUAL = [
    (SELFPLAY, "prompts"),
    (CLASSIFIER, "data.batch_size"),
    (VAE, "data.batch_size"),
    (TEXT, "batch_size"),
    (SWEEP, "space.data.batch_size.grid[1]"),
    (PIPELINE, "stages.b.data.batch_size"),
]


@pytest.fixture
def spec_of(tmp_path: Path):
    def make(tree: dict, **changes: object) -> RunSpec:
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump({"name": "one", "store": str(tmp_path / "runs"), **tree, **changes}))
        return load(path, KINDS)

    return make


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of the process `rank` of `count` that torchrun has started."""

    def launch(count: int, rank: int = 0) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))

    return launch


def run(spec: RunSpec, engine: str = "local") -> None:
    launch(spec, engine, None, Display(io.StringIO()), NullSink())


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("tree", "place"), UNEQUAL, ids=lambda value: value["kind"] if isinstance(value, dict) else "")
def test_a_batch_that_the_processes_cannot_share_is_refused_before_anything_starts(
    tree, place, rank, spec_of, torchrun, tmp_path
):
    spec = spec_of(tree)
    torchrun(4, rank)
    with pytest.raises(UserError, match="does not divide by 4 workers") as caught:
        run(spec)
    assert f"{place}: " in str(caught.value)
    assert "torchrun has started 4 processes" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_what_the_processes_can_share_is_the_same_experiment(spec_of):
    sweep = {**SWEEP, "space": {"threats.linf.eps": {"grid": ["8/255", 0.1]}}}
    stages = {"a": CLASSIFIER, "b": VAE, "c": {**MEASURE, "workers": {"count": 1}}, "d": sweep}
    spec = spec_of(PIPELINE, stages=stages)
    shared = for_processes(spec, 3)
    counts = {name: getattr(stage, "base", stage).workers.count for name, stage in shared.stages.items()}
    assert counts == {"a": 3, "b": 3, "c": 1, "d": 3}  # one process asks the questions of c, and the others wait
    assert [trial.spec.workers.count for trial in shared.stages["d"].trials()] == [3, 3]
    assert [spec_hash(stage) for stage in shared.stages.values()] == [
        spec_hash(stage) for stage in spec.stages.values()
    ]
    assert for_processes(spec, 1) is spec


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_stages_and_trials_of_two_processes_follow_each_other(tmp_path, fork_server):
    """Each run has a process group of its own, and none waits for addresses of the run before."""
    stage = {**CLASSIFIER, "model": {"name": "cnn", "width": 4}, "evaluate": {"num_examples": 20}}
    stage["data"] = {"name": "digits", "batch_size": 50, "limit": 200, "validation": 20}
    sweep = {**SWEEP, "base": stage, "space": {"train.optimizer.lr": {"grid": [0.1, 0.05]}}}
    tree = {"kind": "pipeline", "name": "two", "store": str(tmp_path / "runs"), "stages": {"a": stage, "b": sweep}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*launch, "poise", "run", str(tmp_path / "spec.yaml"), "--engine", "local"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = fork_server.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    runs = {name: open_run(tmp_path / "runs", name) for name in ("two-a", "two-b-0000", "two-b-0001", "two-b")}
    assert {run.manifest().status for run in runs.values()} == {"finished"}
    started = [event["workers"] for run in runs.values() for event in run.events() if event["event"] == "start"]
    assert started == [2, 2, 2]
    assert done.stderr.count("[two-b-0000] finished") == 1, "both processes speak"


def test_self_play_drops_no_question_whatever_started_its_workers(spec_of):
    context = SimpleNamespace(world_size=2)
    with pytest.raises(UserError, match="3 questions cannot be shared equally by 2 workers"):
        SelfPlay(spec_of(SELFPLAY), None, [], None, str, None, context)


def test_ray_under_a_launcher_is_refused(spec_of, torchrun):
    spec = spec_of(CLASSIFIER)
    torchrun(2)
    with pytest.raises(UserError, match="use --engine local"):
        run(spec, "ray")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "3"}, "RANK is 3 and WORLD_SIZE 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ],
)
def test_what_no_launcher_sets_is_told(environment, message, spec_of, monkeypatch):
    """A process of rank 3 of 1 would lead nothing, and write nothing."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        run(spec_of({**CLASSIFIER, "data": {"name": "digits", "batch_size": 8}}))


def test_a_process_started_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() == (0, 1, 0)


def test_more_processes_than_gpus_are_refused(spec_of, torchrun, monkeypatch):
    import torch

    spec = spec_of({**CLASSIFIER, "data": {"name": "digits", "batch_size": 8}}, workers={"gpus": 1})
    torchrun(4, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 3 of this machine has no GPU of its own, there are 2"):
        run(spec)
