"""Sweeps: what is kept of their trials, and that neither a failed trial nor a dead driver changes the others."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from fork_server import ForkedProcess, ForkServer
from poise import kinds
from poise.engine.launch import launch
from poise.engine.lifecycle import claim, spec_hash
from poise.engine.ray.tune import _TrialCallback
from poise.engine.sweep import Tally, history, run_sweep, trial_result
from poise.errors import PoiseError, UserError
from poise.kinds.sweep.spec import SweepSpec
from poise.observe.progress import Display
from poise.observe.rows import Rows, read_rows
from poise.observe.sinks import NullSink
from poise.spec import RunSpec, dump
from poise.store.lease import Lease
from poise.store.runs import Run, open_run
from poise.train.context import Context

BASE = {
    "kind": "robust.train",
    "model": {"name": "cnn", "width": 4},
    "data": {"name": "digits", "batch_size": 128, "validation": 100},
    "threats": {"linf": {"eps": "8/255", "steps": 2}},
    "objective": {"name": "at"},
    "train": {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
    "evaluate": {"num_examples": 40},
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
    launch(spec, "local", None, display or Display(io.StringIO()), NullSink())
    return open_run(spec.store, spec.name)


def trials_of(spec: SweepSpec) -> list[Run]:
    return [open_run(spec.store, trial.spec.name) for trial in spec.trials()]


def summary(run: Run) -> dict[str, Any]:
    return dict(json.loads(run.read("result.json")))


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


DRAWN = {"train.optimizer.lr": {"log_uniform": [0.01, 0.2]}}


@pytest.fixture(scope="module")
def two_drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a finished sweep of two draws, judged by the robust accuracy on the validation split."""
    store = tmp_path_factory.mktemp("drawn")
    locally(drawn(store))
    return store


def drawn(store: Path, **changes: Any) -> SweepSpec:
    base = {**BASE, "evaluate": {"num_examples": 40, "validation": True}}
    search = {"name": "random", "samples": 2}
    tree = {**SWEEP, "store": str(store), "base": base, "space": DRAWN, "search": search, **changes}
    return SweepSpec.model_validate(SweepSpec.expand(tree)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "clean"},
        {"mode": "min"},
        {"metric": "validation.best.clean"},
        {"search": {"name": "random", "samples": 3}},
        {"search": {"name": "random", "samples": 1}},
    ],
)
def test_trials_judged_otherwise_or_more_of_them_under_the_same_name_run_none_of_the_others_again(
    changes, two_drawn, tmp_path
):
    store = tmp_path / "copy"
    shutil.copytree(two_drawn, store)
    first, second = drawn(store), drawn(store, **changes)
    before = [run.manifest() for run in trials_of(first)]
    run = locally(second)
    assert [run.manifest() for run in trials_of(first)] == before
    kept = summary(run)
    found = [(trial["metric"], trial["run"]) for trial in kept["trials"]]
    assert len(found) == second.num_trials
    assert kept["best"] == (min if second.mode == "min" else max)(found, key=lambda pair: pair[0])[1]
    assert (kept["metric"], kept["mode"]) == (second.metric, second.mode)
    assert yaml.safe_load(run.read("spec.yaml")) == yaml.safe_load(dump(second))
    assert not run.verify()
    done = run.manifest()
    locally(second)
    assert run.manifest() == done, "a sweep of which nothing is left was run again"


def test_what_varies_and_the_base_make_another_sweep(two_drawn):
    for changes in ({"space": {"train.optimizer.lr": {"log_uniform": [0.01, 0.3]}}}, {"seed": 4}):
        with pytest.raises(UserError, match="another spec"):
            locally(drawn(two_drawn, **changes))


def test_the_same_command_tries_failed_trials_again_and_no_other(sweep_of, monkeypatch):
    spec, honest = sweep_of(), kinds.run

    def run_one(trial: RunSpec, context: Context) -> None:
        if trial.name == "s-0001":
            raise RuntimeError("out of memory")
        honest(trial, context)

    monkeypatch.setattr(kinds, "run", run_one)
    stream = io.StringIO()
    run = locally(spec, Display(stream))
    assert summary(run)["failed"] == ["s-0001"]
    assert "[s-0001] failed: out of memory" in stream.getvalue()
    assert "[s] 1 of 3 trials failed; the same command tries them again" in stream.getvalue()
    before = [one.manifest() for one in trials_of(spec)]
    monkeypatch.setattr(kinds, "run", honest)
    locally(spec)
    after = [one.manifest() for one in trials_of(spec)]
    assert (after[0], after[2]) == (before[0], before[2])
    assert [one["status"] for one in summary(run)["trials"]] == ["finished"] * 3
    assert summary(run)["failed"] == []


def test_a_trial_that_could_not_begin_says_why(sweep_of):
    """Its record has nothing to say: the error is told with the trial, not that it has no end."""
    spec = sweep_of()
    stream = io.StringIO()
    with trials_of(spec)[1].lease():
        run = locally(spec, Display(stream))
    trial = summary(run)["trials"][1]
    assert trial["status"] == "failed"
    assert "held by process" in trial["error"]
    assert f"[s-0001] failed: {trial['error']}" in stream.getvalue()


def test_more_gpus_than_there_are_is_said_before_any_trial(sweep_of):
    spec = sweep_of(workers={"gpus": 1})
    with pytest.raises(UserError, match=r"torch sees no GPU here; use --set workers\.gpus=0"):
        locally(spec)
    assert not Path(spec.store).exists()


def test_trials_are_judged_on_validation_under_the_attacks_of_the_evaluation(two_drawn):
    """What the test says of a trial plays no part: the two orders differ here, or the metric is that of the trial."""
    spec = drawn(two_drawn, metric="validation.best.robust/union")
    for trial, run in zip(spec.trials(), trials_of(spec), strict=True):
        found = trial_result(spec, trial)
        assert found.metric == summary(run)["validation"]["best"]["robust/union"]
        assert (found.num_examples, found.num_tested) == (40, 40)
    assert spec.source.examples == "validation"


def test_what_a_trial_trained_on_is_never_taken_for_what_it_held_out(sweep_of):
    """Rows of training bear the names of validation: a trial without the latter has no metric."""
    spec = sweep_of(space={"train.epochs": {"grid": [1]}})
    (trial,), (run,) = spec.trials(), trials_of(spec)
    rows = Rows()
    rows.add(10, 1.0, "train", {"robust/union": 0.99})
    run.write("metrics/rows-00000010.parquet", rows.to_parquet())
    assert history(spec, run) == []
    assert trial_result(spec, trial).metric is None


def test_a_trial_stopped_by_another_judgement_goes_on(sweep_of):
    spec = sweep_of(base={**BASE, "train": {"epochs": 4}}, scheduler={"name": "asha"})
    first, run = spec.trials()[0], trials_of(spec)[0]
    callback = _TrialCallback([first], {0}, Tally(spec, Display(io.StringIO()), 0))
    with pytest.raises(PoiseError), claim(run, first.spec):
        raise PoiseError("taken away")
    callback.stopped.add(0)
    place = SimpleNamespace(config={"index": 0})
    callback.on_trial_result(0, (), place, {"steps": 5, "epochs": 1.0, "metric": 0.25})
    callback.on_trial_complete(0, (), place)
    callback.record_all_ends()
    assert run.manifest().status == "stopped"
    kept = trial_result(spec, first)
    assert (kept.status, kept.metric, kept.step) == ("stopped", 0.25, 5), "a stopped trial keeps what it has reported"
    left = {name: is_left(sweep_of(base={**BASE, "train": {"epochs": 4}}, **changes)) for name, changes in {
        "same": {"scheduler": {"name": "asha"}},
        "more at a time": {"scheduler": {"name": "asha"}, "concurrent": 3},
        "none": {},
        "mode": {"scheduler": {"name": "asha"}, "mode": "min"},
        "metric": {"scheduler": {"name": "asha"}, "metric": "clean"},
        "reduction": {"scheduler": {"name": "asha", "reduction": 2}},
    }.items()}  # fmt: skip
    assert left == {
        "same": False,
        "more at a time": False,
        "none": True,
        "mode": True,
        "metric": True,
        "reduction": True,
    }


def is_left(spec: SweepSpec) -> bool:
    """Whether the first trial of a sweep is to be run."""
    given = []
    with suppress(PoiseError):
        run_sweep(spec, Display(io.StringIO()), NullSink(), lambda spec, left, *rest: given.extend(left))
    return 0 in [trial.index for trial in given]


def test_a_number_of_the_summary_is_a_metric_too(sweep_of):
    spec = sweep_of(metric="accuracy.final.clean", space={"train.epochs": {"grid": [1]}})
    kept, (trial,) = summary(locally(spec)), trials_of(spec)
    assert kept["trials"][0]["metric"] == summary(trial)["accuracy"]["final"]["clean"]


def test_trials_that_have_ended_are_not_run_again_and_the_result_is_the_same(sweep_of):
    whole, cut = sweep_of("whole"), sweep_of("cut")
    locally(whole)
    first, second, _ = cut.trials()
    launch(first.spec, "local", None, Display(io.StringIO()), NullSink())
    stopped = open_run(cut.store, second.spec.name)
    launch(second.spec, "local", None, Display(io.StringIO()), NullSink())
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
    assert len({spec_hash(spec) for spec in same}) == 1
    assert spec_hash(sweep_of(seed=4)) != spec_hash(sweep_of())
    assert spec_hash(sweep_of(base={**BASE, "train": {"epochs": 2}})) != spec_hash(sweep_of())


def test_trials_in_turn_cannot_stop_each_other(sweep_of):
    with pytest.raises(UserError, match="--engine ray"):
        locally(sweep_of(base={**BASE, "train": {"epochs": 3}}, scheduler={"name": "asha"}))


@pytest.fixture
def running(fork_server: ForkServer, tmp_path: Path):
    """Starts the command line, on a Ray cluster of its own or on none, in a process that can be killed."""
    processes = []

    def start(spec: SweepSpec, engine: str = "ray") -> tuple[ForkedProcess, Path]:
        path, log = tmp_path / "sweep.yaml", tmp_path / f"{time.monotonic_ns()}.log"
        path.write_text(dump(spec))
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
        arguments = ["-m", "poise", "run", str(path), "--engine", engine]
        with log.open("wb") as output:
            process = fork_server.start(arguments, output, output, env=environment, new_session=True)
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


def test_what_the_process_of_a_trial_says_reaches_the_terminal_and_the_result(sweep_of):
    spec = sweep_of()
    stream = io.StringIO()
    tally = Tally(spec, Display(stream), 0)
    callback = _TrialCallback(spec.trials(), {0, 1, 2}, tally)
    place = SimpleNamespace(config={"index": 1})
    callback.on_trial_result(0, (), place, {"note": "waiting: s-0001 needs 2 GPU"})
    callback.on_trial_result(0, (), place, {"error": "workers.gpus is 1 and torch sees no GPU here"})
    callback.on_trial_complete(0, (), place)
    callback.record_all_ends()
    assert "waiting: s-0001 needs 2 GPU\n" in stream.getvalue()
    assert "[s-0001] failed: workers.gpus is 1 and torch sees no GPU here\n" in stream.getvalue()
    assert tally.result(spec.trials()[1]).error == "workers.gpus is 1 and torch sees no GPU here"


def wait_until(condition: Callable[[], Any], process: ForkedProcess, log: Path) -> None:
    """Wait for something true, and fail at once if the process ends before it."""
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def assert_ended_by(number: signal.Signals, process: ForkedProcess, log: Path) -> None:
    """A signal ends a sweep: it says what goes on, and leaves no process behind."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    ended, said = (130, "stopped; the same command goes on") if number is signal.SIGINT else (75, "goes on from there")
    assert process.wait(60) == ended, log.read_text()
    assert said in log.read_text()
    assert "Traceback" not in log.read_text()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def held(runs: list[Run]) -> list[str]:
    return [run.name for run in runs if Lease.is_held(run.storage, run.name)]


def last_step(run: Run) -> int:
    return max([commit.step for commit in run.checkpoints.commits()], default=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_on_ray_that_is_told_to_end_and_killed_goes_on_and_ends_in_the_same_bits(sweep_of, running):
    """Its trials are cut off: none of them is taken for one that has failed. One at a time, and then two."""
    space = {"train.epochs": {"grid": [1, 50, 49]}}
    whole, cut = sweep_of("whole", space=space), sweep_of("cut", space=space)
    locally(whole)
    sweep, (first, second, third) = open_run(cut.store, cut.name), trials_of(cut)
    for number in (signal.SIGINT, signal.SIGUSR1):
        before = last_step(second)
        process, log = running(cut)
        wait_until(lambda before=before: status_of(first) == "finished" and last_step(second) > before, process, log)
        assert_ended_by(number, process, log)
        assert held([sweep, first, second]) == []
        assert [status_of(run) for run in (sweep, first, second, third)] == ["running", "finished", "running", "none"]
    done, before = first.manifest(), last_step(second)
    both = sweep_of("cut", space=space, concurrent=2)
    process, log = running(both)
    wait_until(lambda: last_step(second) > before and last_step(third), process, log)
    process.kill()
    process.wait()
    assert [status_of(run) for run in (second, third)] == ["running", "running"], "killed too late"
    process, log = running(both)
    assert process.wait(300) == 0, log.read_text()
    assert first.manifest() == done
    for run, num_starts in ((second, 4), (third, 2)):
        starts = [event["step"] for event in run.events() if event["event"] == "start"]
        assert len(starts) == num_starts
        assert starts[0] == 0
        assert starts == sorted(set(starts)), f"{run.name} did not go on from its commit"
    assert facts(both) == facts(whole)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_in_one_process_that_is_told_to_end_says_what_goes_on(sweep_of, running):
    spec = sweep_of(space={"train.epochs": {"grid": [1, 25]}})
    sweep, (first, second) = open_run(spec.store, spec.name), trials_of(spec)
    process, log = running(spec, "local")
    wait_until(lambda: status_of(first) == "finished" and second.checkpoints.commits(), process, log)
    assert_ended_by(signal.SIGINT, process, log)
    assert held([sweep, first, second]) == []
    assert [status_of(run) for run in (sweep, first, second)] == ["running", "finished", "running"]
    before = first.manifest()
    process, log = running(spec, "local")
    assert process.wait(200) == 0, log.read_text()
    assert (first.manifest(), status_of(second)) == (before, "finished")
    starts = [event["step"] for event in second.events() if event["event"] == "start"]
    assert starts[0] == 0 < starts[1], "the second trial did not go on from its commit"


@pytest.mark.parametrize(("stopped", "status"), [({0}, "stopped"), (set(), "failed")])
def test_what_the_scheduler_stopped_has_not_failed_whatever_its_process_wrote(stopped, status, sweep_of):
    """Tune takes the worker group of a stopped trial away, and its process may live to record that as a failure."""
    spec = sweep_of(space={"train.optimizer.lr": {"grid": [0.1]}})
    (trial,), (run,) = spec.trials(), trials_of(spec)
    with pytest.raises(PoiseError, match="its controller is gone"), claim(run, trial.spec):
        raise PoiseError("its controller is gone")
    callback = _TrialCallback([trial], {0}, Tally(spec, Display(io.StringIO()), 0))
    callback.stopped |= stopped
    callback.on_trial_complete(0, (), SimpleNamespace(config={"index": 0}))
    callback.record_all_ends()
    assert not callback.unrecorded
    assert run.manifest().status == status
    assert ("stopped early" in [event["event"] for event in run.events()]) == bool(stopped)


@pytest.fixture(scope="module")
def private_cluster():
    """A Ray cluster of this process, with as many CPUs as two workers take."""
    from poise.engine.ray.worker_group import cluster

    spec = SweepSpec.model_validate(SweepSpec.expand({**SWEEP, "space": RATES, "workers": {"count": 2}})[0])
    with cluster(None, [spec.base]) as private:
        yield private
        family = processes_of_ray()
    alive = [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert not alive, "processes have outlived their cluster"


def processes_of_ray() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.name().startswith("ray::")]


def by_tune_here(spec: SweepSpec) -> tuple[dict[str, Any], str]:
    """The summary of a sweep by Tune on the cluster of this process, and what was printed."""
    from poise.engine.ray.tune import run_trials_with_tune

    stream = io.StringIO()
    run_sweep(spec, Display(stream), NullSink(), run_trials_with_tune)
    return summary(open_run(spec.store, spec.name)), stream.getvalue()


def asha(lr: Any, epochs: int, **changes: Any) -> dict[str, Any]:
    """A sweep over learning rates whose trials have to pass a rung after three epochs."""
    base = {**BASE, "train": {"epochs": epochs, "optimizer": {"name": "sgd"}, **changes}}
    scheduler = {"name": "asha", "grace": {"epochs": 3}, "reduction": 2}
    return {"space": {"train.optimizer.lr": {"grid": lr}}, "base": base, "scheduler": scheduler}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_asha_stops_a_bad_trial_of_two_workers_and_the_best_survives(sweep_of, private_cluster):
    """One at a time, so that what the scheduler compares does not hang on the machine: the second is hopeless.

    It is evaluated at the rung for the first time and stopped there, before it has committed what it reported. The
    next one would need the CPUs that it has held.
    """
    import ray

    spec = sweep_of(workers={"count": 2}, **asha([0.1, 1e-6], 12, evaluate_every={"epochs": 3}))
    kept, output = by_tune_here(spec)
    good, bad = trials_of(spec)
    assert [trial["status"] for trial in kept["trials"]] == ["finished", "stopped"], output
    assert kept["best"] == good.name
    assert good.manifest().final_step == 120
    assert (bad.manifest().final_step or 0) < 120
    assert (kept["trials"][1]["step"], kept["trials"][1]["metric"] < kept["trials"][0]["metric"]) == (30, True)
    assert "stopped early" in [event["event"] for event in bad.events()]
    assert bad.summary().status == "stopped"
    assert "[s-0000] starting 2 workers" in output, "the notes of trials are shown"
    with bad.lease():
        pass
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "a trial that was stopped still holds CPUs"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_asha_stops_a_trial_of_one_worker_that_stands_still(sweep_of, private_cluster):
    """Every evaluation of the second finds the same, in a few hundredths of a second: it is reported all the same."""
    spec = sweep_of(**asha([0.1, 1e-9], 12))
    kept, output = by_tune_here(spec)
    _, still = trials_of(spec)
    assert [trial["status"] for trial in kept["trials"]] == ["finished", "stopped"], output
    points = history(spec, still, reported=True)
    assert len({point.value for point in points}) == 1, "it does not stand still"
    assert [point.step for point in points] == [10, 20, 30]
    assert kept["trials"][1]["metric"] == points[0].value


@pytest.mark.slow
def test_more_than_a_cluster_has_is_refused_or_waited_for_with_a_word(sweep_of, private_cluster):
    from poise.engine.ray.worker_group import check_resources

    wide = sweep_of(workers={"count": 2, "gpus": 1}).base
    with pytest.raises(UserError, match="s needs 2 GPU, and there are 0 on this machine"):
        check_resources(wide, Display(io.StringIO()), private=True)
    stream = io.StringIO()
    check_resources(wide, Display(stream), private=False)
    assert stream.getvalue().startswith("waiting: s needs 2 GPU, and there are 0 on the cluster")
    check_resources(sweep_of(workers={"count": 2}).base, Display(stream), private=True)
