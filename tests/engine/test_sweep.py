"""Sweeps: what is kept of their trials, and that neither a failed trial nor a dead driver changes the others."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from poise.engine.drive import drive
from poise.engine.session import claim, identity
from poise.engine.sweep import Tally
from poise.errors import PoiseError, UserError
from poise.kinds.specs.sweep import SweepSpec
from poise.observe.progress import Display
from poise.observe.rows import read_rows
from poise.observe.sinks import NullSink
from poise.spec import dump
from poise.store.runs import Run, open_run

BASE = {
    "kind": "robust.train",
    "model": {"name": "cnn", "width": 4},
    "data": {"name": "digits", "batch_size": 128, "validation": 100},
    "threats": {"linf": {"eps": "8/255", "steps": 2}},
    "objective": {"name": "at"},
    "train": {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
    "evaluate": {"examples": 40},
}
SWEEP = {"kind": "sweep", "name": "s", "seed": 3, "metric": "robust/union", "mode": "max", "base": BASE}
RATES = {"train.optimizer.lr": {"grid": [0.1, 0.01, "1/20"]}}


@pytest.fixture
def sweep_of(tmp_path: Path) -> Callable[..., SweepSpec]:
    def make(store: str = "runs", **changes: Any) -> SweepSpec:
        tree = {**SWEEP, "store": str(tmp_path / store), "space": RATES, **changes}
        return SweepSpec.model_validate(SweepSpec.expand(tree)[0])

    return make


def locally(spec: SweepSpec, display: Display | None = None) -> Run:
    drive(spec, "local", None, display or Display(io.StringIO()), NullSink())
    return open_run(spec.store, spec.name)


def trials_of(spec: SweepSpec) -> list[Run]:
    return [open_run(spec.store, trial.spec.name) for trial in spec.trials()]


def summary(run: Run) -> dict[str, Any]:
    return dict(json.loads(run.read("artifacts/summary.json")))


def facts(spec: SweepSpec) -> dict[str, Any]:
    """All that must not depend on what happened on the way: checkpoints, metrics, results of every trial."""
    found: dict[str, Any] = {"sweep": summary(open_run(spec.store, spec.name))}
    for run in trials_of(spec):
        rows = read_rows(run.read(name) for name in run.files("metrics/") if "timing" not in name).to_pylist()
        kept = {name: run.read(name) for name in run.files("checkpoints/") if name.endswith(".safetensors")}
        assert len(kept) >= 4
        found[run.name] = rows, kept, summary(run), run.read("artifacts/evaluation-final.parquet")
    return found


def test_what_is_kept_of_a_sweep(sweep_of):
    spec = sweep_of(space={**RATES, "train.epochs": {"grid": [1, 2]}})
    stream = io.StringIO()
    run = locally(spec, Display(stream))
    kept = summary(run)
    assert [trial["run"] for trial in kept["trials"]] == [f"s-000{index}" for index in range(6)]
    assert kept["trials"][4]["values"] == {"train.optimizer.lr": "1/20", "train.epochs": 1}
    assert kept["best"] == max(kept["trials"], key=lambda trial: trial["metric"])["run"]
    assert kept["failed"] == []
    for trial, one in zip(kept["trials"], trials_of(spec), strict=True):
        rows = read_rows(one.read(name) for name in one.files("metrics/")).to_pylist()
        held_out = [(r["value"], -r["step"]) for r in rows if (r["split"], r["name"]) == ("validation", "robust/union")]
        assert (trial["metric"], -trial["step"]) == max(held_out)
        assert trial["test"]["clean"] == summary(one)["accuracy"]["best"]["clean"]
    table = pq.read_table(io.BytesIO(run.read("artifacts/trials.parquet"))).to_pydict()
    assert table["train.optimizer.lr"] == ["0.1", "0.1", "0.01", "0.01", "1/20", "1/20"]
    assert table["metric"] == [trial["metric"] for trial in kept["trials"]]
    assert "[s-0005] finished: robust/union 0." in stream.getvalue()
    assert "[s] sweep  trials 6/6" in stream.getvalue()
    assert not run.verify()


def test_a_failed_trial_is_named_and_the_others_go_on(sweep_of):
    spec = sweep_of(
        space={"train.optimizer.lr": {"grid": [1000, 0.1]}, "train.schedule": {"grid": [{"name": "cosine"}]}}
    )
    run = locally(spec)
    kept = summary(run)
    assert [trial["status"] for trial in kept["trials"]] == ["failed", "finished"]
    assert (kept["failed"], kept["best"]) == (["s-0000"], "s-0001")
    assert "the model has diverged" in kept["trials"][0]["error"]
    assert run.manifest().status == "finished"


def test_a_sweep_whose_trials_all_fail_has_failed(sweep_of):
    with pytest.raises(PoiseError, match=r"all 1 trials have failed; s-0000: .* diverged"):
        locally(sweep_of(space={"train.optimizer.lr": {"grid": [1000]}}))


def test_a_metric_that_no_trial_has_is_told_with_the_nearest(sweep_of):
    spec = sweep_of(metric="robust/unoin", space={"train.epochs": {"grid": [1]}})
    with pytest.raises(PoiseError, match="did you mean 'robust/union'"):
        locally(spec)


def test_a_number_of_the_summary_is_a_metric_too(sweep_of):
    spec = sweep_of(metric="accuracy.final.clean", space={"train.epochs": {"grid": [1]}})
    kept, (trial,) = summary(locally(spec)), trials_of(spec)
    assert kept["trials"][0]["metric"] == summary(trial)["accuracy"]["final"]["clean"]


def test_trials_that_have_ended_are_not_run_again_and_the_result_is_the_same(sweep_of):
    whole, cut = sweep_of("whole"), sweep_of("cut")
    locally(whole)
    first, second, _ = cut.trials()
    drive(first.spec, "local", None, Display(io.StringIO()), NullSink())
    stopped = open_run(cut.store, second.spec.name)
    drive(second.spec, "local", None, Display(io.StringIO()), NullSink())
    stopped.finish("stopped", final_step=9)
    before = [run.manifest() for run in trials_of(cut)[:2]]
    locally(cut)
    assert [run.manifest() for run in trials_of(cut)[:2]] == before
    expected = facts(whole)
    expected["sweep"]["trials"][1]["status"] = "stopped"
    assert facts(cut) == expected


def test_how_many_at_a_time_and_on_how_many_workers_does_not_make_another_sweep(sweep_of):
    workers = {"count": 2, "cpus": 1}
    same = [sweep_of(), sweep_of(concurrent=3), sweep_of(workers=workers), sweep_of("elsewhere")]
    assert len({identity(spec) for spec in same}) == 1
    assert identity(sweep_of(seed=4)) != identity(sweep_of())
    assert identity(sweep_of(base={**BASE, "train": {"epochs": 2}})) != identity(sweep_of())


def test_trials_in_turn_cannot_stop_each_other(sweep_of):
    with pytest.raises(UserError, match="--engine ray"):
        locally(sweep_of(scheduler={"name": "asha"}))


def by_ray(spec: SweepSpec, folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """The command line on a Ray cluster of its own, in a process that can be killed."""
    path, log = folder / "sweep.yaml", folder / f"{time.monotonic_ns()}.log"
    path.write_text(dump(spec))
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "poise", "run", str(path)]
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return process, log


@pytest.fixture
def running(tmp_path: Path):
    processes = []

    def start(spec: SweepSpec) -> tuple[subprocess.Popen[bytes], Path]:
        process, log = by_ray(spec, tmp_path)
        processes.append(process)
        return process, log

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def status_of(run: Run) -> str:
    known = run.manifest()
    return known.status if known else "none"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_goes_on_after_its_driver_was_killed_and_ends_in_the_same_bits(sweep_of, running):
    space = {"train.epochs": {"grid": [1, 30, 2]}}
    whole, killed = sweep_of("whole", space=space), sweep_of("killed", space=space, concurrent=2)
    locally(whole)
    process, log = running(killed)
    first, second, *_ = trials_of(killed)
    deadline = time.monotonic() + 200
    while not (status_of(first) == "finished" and status_of(second) == "running" and second.checkpoints.commits()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = first.manifest()
    assert "finished" not in [status_of(run) for run in trials_of(killed)[1:]], "killed too late"
    process, log = running(killed)
    assert process.wait(300) == 0, log.read_text()
    assert first.manifest() == before
    starts = [event["step"] for event in second.events() if event["event"] == "start"]
    assert starts[0] == 0 < starts[1], "the second trial did not go on from its commit"
    assert facts(killed) == facts(whole)


@pytest.mark.parametrize(("stopped", "status"), [({0}, "stopped"), (set(), "failed")])
def test_what_the_scheduler_stopped_has_not_failed_whatever_its_process_wrote(stopped, status, sweep_of):
    """Tune takes the gang of a stopped trial away, and its process may live to record that as a failure."""
    from poise.engine.trials import _Overseer

    spec = sweep_of(space={"train.optimizer.lr": {"grid": [0.1]}})
    (trial,), (run,) = spec.trials(), trials_of(spec)
    with pytest.raises(PoiseError, match="its controller is gone"), claim(run, trial.spec):
        raise PoiseError("its controller is gone")
    overseer = _Overseer([trial], {0}, Tally(spec, Display(io.StringIO()), 0))
    overseer.stopped |= stopped
    overseer.on_trial_complete(0, (), SimpleNamespace(config={"index": 0}))
    overseer.settle_all()
    assert not overseer.unsettled
    assert run.manifest().status == status
    assert ("stopped early" in [event["event"] for event in run.events()]) == bool(stopped)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_asha_stops_a_bad_trial_and_the_best_survives(sweep_of, running):
    """One at a time, so that what the scheduler compares does not hang on the machine: the second is hopeless."""
    spec = sweep_of(
        space={"train.optimizer.lr": {"grid": [0.1, 1e-6]}},
        base={**BASE, "train": {"epochs": 12, "optimizer": {"name": "sgd"}}},
        scheduler={"name": "asha", "grace": {"epochs": 3}, "reduction": 2},
        workers={"count": 2},
    )
    process, log = running(spec)
    assert process.wait(400) == 0, log.read_text()
    good, bad = trials_of(spec)
    kept = summary(open_run(spec.store, spec.name))
    assert [trial["status"] for trial in kept["trials"]] == ["finished", "stopped"], log.read_text()
    assert kept["best"] == good.name
    assert good.manifest().final_step == 120
    assert 20 <= bad.manifest().final_step < 120  # stopped on the report of epoch 3, before its commit
    assert "stopped early" in [event["event"] for event in bad.events()]
    assert bad.summary().status == "stopped"
    with bad.lease():
        pass
