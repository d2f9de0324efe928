"""The trials of a sweep on a Ray cluster: Tune says which run at the same time, and which are stopped early.

A trial of one worker runs in Tune's own process; one of several starts a gang of them, as a run by itself does. What
Tune remembers is thrown away: when a sweep goes on, its scheduler is told again what the store has of every trial.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.util.placement_group import PlacementGroup, remove_placement_group

from poise import kinds
from poise.engine.session import absolute_store, located
from poise.engine.sweep import STOPPED_EARLY, Point, Tally, history, judgement, keep_reports
from poise.errors import PoiseError, RunBusyError
from poise.kinds.specs.sweep import AshaSpec, SweepSpec, Trial
from poise.observe.events import event
from poise.observe.progress import Display, Progress
from poise.observe.sinks import Sink
from poise.spec import RunSpec
from poise.store.lease import Lease
from poise.store.storage import scratch_folder

__all__ = ["by_tune"]

_SHOWN_EVERY_S = 1.0
_FREE_WITHIN_S = 60.0
_NO_END = 10**9
_DIED = "its process died"


@dataclass(frozen=True)
class _Errand:
    """What the process of a trial is sent: nothing in it is a secret."""

    sweep_json: str
    kind: str
    spec_json: str
    store: str
    folder: str
    left: bool
    """Whether it is to be run; one that has ended tells its metric alone."""


def by_tune(spec: SweepSpec, left: Sequence[Trial], tally: Tally, sink: Sink) -> None:
    """Run the trials that are left as Tune trials.

    A scheduler that compares trials is given all of them: those that have ended tell it their metric, and end.
    """
    told = spec.trials() if isinstance(spec.scheduler, AshaSpec) and left else left
    if not told:
        return
    numbers = {trial.index for trial in left}
    errands = [_errand(spec, trial, left=trial.index in numbers) for trial in told]

    def trial(config: dict[str, int]) -> None:
        _run(errands[config["index"]])

    with scratch_folder() as scratch:
        overseer = _Overseer(told, numbers, tally)
        tune.Tuner(
            tune.with_resources(trial, _resources(spec.base)),
            param_space={"index": tune.grid_search(list(range(len(errands))))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=spec.concurrent, scheduler=_scheduler(spec, overseer.stopped)
            ),
            run_config=tune.RunConfig(
                name=spec.name,
                storage_path=str(scratch),
                failure_config=tune.FailureConfig(max_failures=spec.base.workers.max_failures),
                callbacks=[overseer],
                verbose=0,
            ),
        ).fit()
        overseer.settle_all()


def _errand(spec: SweepSpec, trial: Trial, *, left: bool) -> _Errand:
    store = absolute_store(trial.spec)
    return _Errand(spec.model_dump_json(), trial.spec.kind, trial.spec.model_dump_json(), store, os.getcwd(), left)


def _alone(spec: RunSpec) -> bool:
    """Whether a trial runs in the process that Tune starts for it: one worker, and no engines beside it."""
    return spec.workers.count == 1 and getattr(getattr(spec, "sampler", None), "backend", None) != "vllm"


def _resources(spec: RunSpec) -> dict[str, float]:
    """What Tune sets aside for a trial; a gang asks for its own, so its trial takes next to nothing."""
    if _alone(spec):
        return {"cpu": spec.workers.cpus, "gpu": spec.workers.gpus}
    return {"cpu": 0, "memory": 1}


def _scheduler(spec: SweepSpec, stopped: set[int]) -> TrialScheduler:
    if not isinstance(spec.scheduler, AshaSpec):
        return FIFOScheduler()
    grace = spec.scheduler.grace
    return _Asha(
        stopped,
        time_attr="steps" if grace.steps else "epochs",
        metric="metric",
        mode=spec.mode,
        max_t=_NO_END,
        grace_period=grace.steps or grace.epochs,
        reduction_factor=float(spec.scheduler.reduction),
        stop_last_trials=False,
    )


class _Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA that keeps which trials it stopped.

    How the process of such a trial ends does not say so: Tune takes its gang away, which looks to it like a failure.
    """

    def __init__(self, stopped: set[int], **options: Any) -> None:
        super().__init__(**options)
        self.stopped = stopped

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.config["index"])
        return decision


class _Overseer(tune.Callback):  # type: ignore[misc]
    """In the driver: shows what trials do, and records the end of those that could not do so themselves."""

    def __init__(self, told: Sequence[Trial], left: set[int], tally: Tally) -> None:
        self.told, self.left, self.tally = told, left, tally
        self.stopped: set[int] = set()  # by the scheduler
        self.unsettled: dict[int, Trial] = {}
        self.reports: dict[int, list[Point]] = {}
        self.groups: dict[int, PlacementGroup] = {}
        self.on_usr1 = signal.getsignal(signal.SIGUSR1)

    def setup(self, *_: Any, **__: Any) -> None:
        """Take SIGUSR1 back, which announces an end under Slurm.

        Tune has just taken it, to return as if the sweep were over: trials that were cut off would count as failed.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self.on_usr1)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
        mine = self.told[trial.config["index"]]
        if "progress" in result:
            self.tally.display.show(Progress(**result["progress"]))
        if "metric" in result:
            point = Point(result["steps"], result["epochs"], result["metric"])
            self.reports.setdefault(mine.index, []).append(point)
        if "note" in result:
            self.tally.display.note(result["note"])
        if "group" in result:
            self.groups[mine.index] = result["group"]
        if "error" in result:
            self.tally.errors[mine.spec.name] = result["error"]

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        mine = self.told[trial.config["index"]]
        self._give_back(trial)
        if mine.index in self.left:
            self.unsettled[mine.index] = mine

    on_trial_error = on_trial_complete  # how it ended is in its record, or known to the scheduler

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._give_back(trial)

    def _give_back(self, trial: Any) -> None:
        """What the gang of a trial has set aside: Tune takes the process that would do so away, and Ray then keeps it
        until the driver ends. The next trial would wait for it for ever."""
        group = self.groups.pop(self.told[trial.config["index"]].index, None)
        if group is not None:
            remove_placement_group(group)

    def on_step_end(self, iteration: int, trials: Any, **_: Any) -> None:
        for trial in list(self.unsettled.values()):
            self._settle(trial)

    def settle_all(self) -> None:
        """Wait until no process holds a trial any more, and record their ends."""
        deadline = time.monotonic() + _FREE_WITHIN_S
        while self.unsettled and time.monotonic() < deadline:
            self.on_step_end(0, ())
            time.sleep(0.1)

    def _settle(self, trial: Trial) -> None:
        """Once its process has let go of it: what the scheduler stopped is stopped, what still runs has died."""
        run = located(trial.spec)
        if Lease.is_held(run.storage, run.name):
            return
        known, stopped = run.manifest(), trial.index in self.stopped
        if known is not None and (known.status == "running" or (stopped and known.status in ("failed", "stopped"))):
            try:
                with run.lease():
                    commits = run.checkpoints.commits()
                    if stopped:
                        keep_reports(run, self.tally.spec, self.reports.get(trial.index, ()))
                        run.append_events([event(STOPPED_EARLY, judgement=judgement(self.tally.spec))])
                    else:
                        run.append_events([event("failed", why=_DIED)])
                    run.finish(
                        "stopped" if stopped else "failed",
                        final_step=commits[-1].step if commits else None,
                        error=None if stopped else _DIED,
                    )
            except RunBusyError:
                return
        del self.unsettled[trial.index]
        self.tally.count(trial)


def _run(errand: _Errand) -> None:
    """In the process of a trial: tell Tune what is committed, then run what is left.

    A PoiseError is told to the driver, since the run may have no record of it. Tune is told of other errors alone: a
    new attempt may mend them.
    """
    sweep = SweepSpec.model_validate_json(errand.sweep_json)
    spec = kinds.KINDS[errand.kind].model_validate_json(errand.spec_json)
    if Path(errand.folder).is_dir():
        os.chdir(errand.folder)
    else:
        spec = spec.model_copy(update={"store": errand.store})
    run, reporter = located(spec), _Reporter(sweep)
    if reporter.compares:
        for point in history(sweep, run, reported=not errand.left):
            reporter.tell(point)
    if not errand.left:
        return
    _wait_until_free(spec)
    try:
        _start(spec, reporter)
    except PoiseError as error:
        tune.report({"error": str(error)})


def _start(spec: RunSpec, reporter: _Reporter) -> None:
    from poise.engine.metrics import RaySink

    if _alone(spec):
        from poise.engine.local import run_local

        run_local(spec, reporter, RaySink())
    else:
        from poise.engine.gang import run_gang

        run_gang(spec, reporter, RaySink(), on_group=reporter.hold)


def _wait_until_free(spec: RunSpec) -> None:
    """The process of a driver that died may live on for a moment, and hold the trial."""
    run, deadline = located(spec), time.monotonic() + _FREE_WITHIN_S
    while Lease.is_held(run.storage, run.name) and time.monotonic() < deadline:
        time.sleep(0.5)


class _Reporter(Display):
    """A display whose viewer is Tune: it passes on every evaluation, once a second what is new, and every note.

    An evaluation that repeats the value of the one before is passed on too: a trial that stands still falls behind.
    """

    def __init__(self, spec: SweepSpec) -> None:
        super().__init__()
        self.compares = isinstance(spec.scheduler, AshaSpec)
        self.metric, self.told_at = spec.metric, 0.0

    def show(self, progress: Progress) -> None:
        value = progress.evaluation.get(self.metric)
        if self.compares and value is not None and math.isfinite(value):
            self.tell(Point(progress.step, progress.epoch, value))
        elif not progress.evaluation and time.monotonic() - self.told_at > _SHOWN_EVERY_S:
            self.told_at = time.monotonic()
            tune.report({"progress": asdict(progress)})

    def tell(self, point: Point) -> None:
        """An evaluation for the scheduler. When it stops the trial, this does not return."""
        tune.report({"steps": point.step, "epochs": point.epoch, "metric": point.value})

    def hold(self, group: PlacementGroup) -> None:
        """What the gang of the trial has set aside: the driver gives it back if this process is taken away."""
        tune.report({"group": group})

    def note(self, text: str) -> None:
        """A line for the terminal of the driver."""
        tune.report({"note": text})
