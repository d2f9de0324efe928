"""Every spec in `jobs/` is sound, with and without its profiles; the small ones of robust training do run."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import yaml

from poise.engine.launch import launch
from poise.kinds import KINDS
from poise.observe.progress import Display
from poise.observe.sinks import NullSink
from poise.robust.objectives import OBJECTIVES
from poise.spec import load
from poise.store.runs import open_run

JOBS = Path(__file__).parents[1] / "jobs"
SPECS = sorted(JOBS.rglob("*.yaml"))
ROBUST = [path for path in sorted((JOBS / "robust").glob("*.yaml")) if "kind: robust.train" in path.read_text()]


def profiles(path: Path) -> list[str | None]:
    return [None, *yaml.safe_load(path.read_text()).get("profiles", {})]


def label(value: object) -> str:
    return str(value.relative_to(JOBS)) if isinstance(value, Path) else str(value)


@pytest.mark.parametrize(("path", "profile"), [(path, p) for path in SPECS for p in profiles(path)], ids=label)
def test_a_spec_of_the_project_is_sound_and_says_what_it_costs(path, profile):
    spec = load(path, KINDS, profile=profile)
    assert spec.cost()
    assert path.read_text().startswith("# ")
    assert f"poise run jobs/{path.relative_to(JOBS)}" in path.read_text()


WORLD = "{entities: 6, relations: 2}"
SMALL = {
    "workers.count": 1,
    "common.digits": {
        "model.width": 4,
        "data": "{name: digits, batch_size: 50, limit: 200, validation: 20}",
        "train.epochs": 1,
        "train.evaluate_every.epochs": 1,
        "train.checkpoint.every.epochs": 1,
        "evaluate.num_examples": 20,
    },
    "common.tune": {
        "data.world": WORLD,
        "batch_size": 8,
        "train.epochs": 1,
        "train.evaluate_every.epochs": 1,
        "train.checkpoint.every.epochs": 1,
    },
    "common.calibration": {
        "questions.world": WORLD,
        "samples": 4,
        "sampler.backend": "transformers",
    },
    "stages.bounds": {"num_examples": 40},
    "stages.pretrain": {
        "data.world": WORLD,
        "model": "{name: llama, hidden: 32, layers: 1, heads: 1}",
        "train.steps": 20,
        "train.schedule.warmup_steps": 2,
        "train.evaluate_every.steps": 20,
        "train.checkpoint.every.steps": 20,
    },
    "stages.selfplay": {
        "questions.world": WORLD,
        "prompts": 3,
        "rollouts": 4,
        "method.opponents": 4,
        "sampler.backend": "transformers",
        "train.steps": 6,
        "train.evaluate_every.steps": 6,
        "train.checkpoint.every.steps": 6,
    },
}
"""What makes the quickstart a matter of seconds in one process; its stages and what they read of each other stay."""


@pytest.mark.slow
def test_the_quickstart_with_small_sizes_in_one_process(fork_server, tmp_path):
    assignments = [f"store={tmp_path}/runs"]
    for section, changes in SMALL.items():
        for key, value in changes.items() if isinstance(changes, dict) else [("", changes)]:
            assignments.append(f"{section}.{key}={value}" if key else f"{section}={value}")
    options = [option for assignment in assignments for option in ("--set", assignment)]
    done = fork_server.run(
        ["-m", "poise", "run", "jobs/quickstart.yaml", "--engine", "local", *options],
        cwd=JOBS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    for title in ("Test accuracy", "Bounds on the gap", "Cross entropy", "Self-play: exploitability", "Calibration"):
        assert title in done.stdout
    stages = yaml.safe_load((JOBS / "quickstart.yaml").read_text())["stages"]
    for stage in stages:
        assert open_run(tmp_path / "runs", f"quickstart-{stage}").manifest().status == "finished"
    assert f"page: {tmp_path}/runs/quickstart/report.html" in done.stdout.replace("\n", "")


def test_every_objective_has_a_job():
    written = {yaml.safe_load(path.read_text())["objective"]["name"] for path in ROBUST}
    assert written == OBJECTIVES.keys()


@pytest.mark.parametrize("path", ROBUST, ids=label)
def test_the_small_profile_of_a_robust_job_trains_and_is_measured(path, tmp_path):
    """Two epochs of 256 images instead of all: the same code, in a second or two."""
    less = ["train.epochs=2", "train.evaluate_every.epochs=1", "train.checkpoint.every.epochs=1", "data.limit=256"]
    less += ["data.validation=40", "evaluate.num_examples=20", f"store={tmp_path}"]
    sections = yaml.safe_load(path.read_text())
    less += [f"{key}.start.epochs=1" for key in ("averaging", "awp") if "start" in sections.get(key, {})]
    spec = load(path, KINDS, less, "small")
    launch(spec, "local", None, Display(io.StringIO()), NullSink())
    run = open_run(spec.store, spec.name)
    summary = json.loads(run.read("result.json"))
    assert run.manifest().status == "finished"
    assert summary["objective"] == spec.objective.name
    assert set(summary["accuracy"]) >= {"best", "final"}
    assert ("averaged" in summary["accuracy"]) == (spec.averaging is not None)
