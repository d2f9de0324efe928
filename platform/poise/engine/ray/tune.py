"""The trials of a sweep on a Ray cluster. Tune decides which trials run at the same time and which are stopped early.

A trial with one worker runs in the process that Tune starts for it; one with several workers starts a worker group, as
a run by itself does. Tune's own state is discarded: when a sweep resumes, every trial first reports to the scheduler
what the store has of it.
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

from poise.engine.lifecycle import absolute_store, located
from poise.engine.sweep import STOPPED_EARLY, Point, Tally, history, judgement, keep_reports
from poise.errors import PoiseError, RunBusyError
from poise.kinds.sweep.spec import AshaSpec, SweepSpec, Trial
from poise.observe.events import event
from poise.observe.progress import Display, Progress
from poise.observe.sinks import Sink
from poise.spec import RunSpec
from poise.store.lease import Lease
from poise.store.runs import Run
from poise.store.storage import scratch_folder

__all__ = ["run_trials_with_tune"]

_SHOWN_EVERY_S = 1.0
_FREE_WITHIN_S = 60.0
_NO_END = 10**9
_DIED = "its process died"


@dataclass(frozen=True)
class _TrialArgs:
    """Arguments sent to the process of a trial. Must not contain credentials: Ray logs them.

    Specs are sent as objects: validating the sweep again in the process of each of N trials would take N^2 validations
    in all. `remaining`: whether the trial is to be run; one that has ended only reports its metric.
    """

    sweep: SweepSpec
    spec: RunSpec
    store: str
    folder: str
    remaining: bool


def run_trials_with_tune(spec: SweepSpec, remaining: Sequence[Trial], tally: Tally, sink: Sink) -> None:
    """Run the `remaining` trials as Tune trials.

    A scheduler that compares trials gets all trials of the sweep: those that have ended report their metric and end.
    """
    trials = spec.trials() if isinstance(spec.scheduler, AshaSpec) and remaining else remaining
    if not trials:
        return
    remaining_indices = {trial.index for trial in remaining}
    trial_args = [_trial_args(spec, trial, remaining=trial.index in remaining_indices) for trial in trials]

    def run_trial(config: dict[str, int]) -> None:
        _run(trial_args[config["index"]])

    with scratch_folder() as scratch:
        callback = _TrialCallback(trials, remaining_indices, tally)
        scheduler = _scheduler(spec, callback.stopped)
        tune.Tuner(
            tune.with_resources(run_trial, _resources(spec.base)),
            param_space={"index": tune.grid_search(list(range(len(trial_args))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=spec.concurrent, scheduler=scheduler),
            run_config=tune.RunConfig(
                name=spec.name,
                storage_path=str(scratch),
                failure_config=tune.FailureConfig(max_failures=spec.base.workers.max_failures),
                callbacks=[callback],
                verbose=0,
            ),
        ).fit()
        callback.record_all_ends()


def _trial_args(spec: SweepSpec, trial: Trial, *, remaining: bool) -> _TrialArgs:
    return _TrialArgs(spec, trial.spec, absolute_store(trial.spec), os.getcwd(), remaining)


def _is_single_process(spec: RunSpec) -> bool:
    """Whether a trial runs in the process that Tune starts for it: it has one worker and no vLLM engines."""
    sampler = getattr(spec, "sampler", None)
    return spec.workers.count == 1 and getattr(sampler, "backend", None) != "vllm"


def _resources(spec: RunSpec) -> dict[str, float]:
    """The resources that Tune reserves for a trial. A worker group reserves its own, so its trial takes one byte."""
    if _is_single_process(spec):
        return {"cpu": spec.workers.cpus, "gpu": spec.workers.gpus}
    return {"cpu": 0, "memory": 1}


def _scheduler(spec: SweepSpec, stopped: set[int]) -> TrialScheduler:
    """Tune's scheduler for the sweep; ASHA adds the index of each trial that it stops to `stopped`."""
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
    """ASHA that records the trials it stopped.

    The end of such a trial's process does not show that: Tune removes its worker group, which the process sees as a
    failure.
    """

    def __init__(self, stopped: set[int], **options: Any) -> None:
        super().__init__(**options)
        self.stopped = stopped

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.config["index"])
        return decision


class _TrialCallback(tune.Callback):  # type: ignore[misc]
    """Runs in the driver: shows the progress of trials, and records the end of those that could not do so themselves.

    `trials` are those that Tune runs, by the index in their config; `remaining` are the numbers in the sweep of those
    that have not ended before.
    """

    def __init__(self, trials: Sequence[Trial], remaining: set[int], tally: Tally) -> None:
        self.trials = trials
        self.remaining = remaining
        self.tally = tally
        self.stopped: set[int] = set()  # numbers of the trials that the scheduler stopped
        self.unrecorded: dict[int, Trial] = {}  # trials that have ended and are not counted yet
        self.reports: dict[int, list[Point]] = {}
        self.groups: dict[int, PlacementGroup] = {}
        self.usr1_handler = signal.getsignal(signal.SIGUSR1)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the tally: its display draws from a thread and cannot be pickled.

        Tune pickles its callbacks for a restore of the experiment, which Poise does not use.
        """
        return {**self.__dict__, "tally": None}

    def setup(self, *_: Any, **__: Any) -> None:
        """Restore the handler of SIGUSR1, which announces preemption under Slurm.

        Tune has just installed its own, which returns as if the sweep were finished: interrupted trials would count as
        failed.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self.usr1_handler)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
        sweep_trial = self._sweep_trial(trial)
        if "progress" in result:
            self.tally.display.show(Progress(**result["progress"]))
        if "metric" in result:
            point = Point(result["steps"], result["epochs"], result["metric"])
            self.reports.setdefault(sweep_trial.index, []).append(point)
        if "note" in result:
            self.tally.display.note(result["note"])
        if "group" in result:
            self.groups[sweep_trial.index] = result["group"]
        if "error" in result:
            self.tally.errors[sweep_trial.spec.name] = result["error"]

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        sweep_trial = self._sweep_trial(trial)
        self._remove_group(trial)
        if sweep_trial.index in self.remaining:
            self.unrecorded[sweep_trial.index] = sweep_trial

    on_trial_error = on_trial_complete  # the outcome is in the run's manifest, or the scheduler stopped the trial

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._remove_group(trial)

    def on_step_end(self, iteration: int, trials: Any, **_: Any) -> None:
        for trial in list(self.unrecorded.values()):
            self._record_end(trial)

    def record_all_ends(self) -> None:
        """Wait until no process holds the lease of an ended trial, and record the end of each."""
        deadline = time.monotonic() + _FREE_WITHIN_S
        while self.unrecorded and time.monotonic() < deadline:
            self.on_step_end(0, ())
            time.sleep(0.1)

    def _sweep_trial(self, trial: Any) -> Trial:
        """The trial of the sweep that a Tune trial runs."""
        index: int = trial.config["index"]
        return self.trials[index]

    def _remove_group(self, trial: Any) -> None:
        """Remove the placement group of a trial's worker group.

        Tune kills the process that would remove it, and Ray then reserves the resources until the driver ends: the next
        trial would wait for them for ever.
        """
        group = self.groups.pop(self._sweep_trial(trial).index, None)
        if group is not None:
            remove_placement_group(group)

    def _record_end(self, trial: Trial) -> None:
        """Record the end of a trial, unless its process still holds the lease of the run.

        A trial that the scheduler stopped becomes `stopped`; one whose manifest still says `running` has died.
        """
        run = located(trial.spec)
        if Lease.is_held(run.storage, run.name):
            return
        manifest = run.manifest()
        stopped = trial.index in self.stopped
        # The process of a stopped trial may have recorded the loss of its worker group as a failure.
        replaceable = ("running", "failed", "stopped") if stopped else ("running",)
        if manifest is not None and manifest.status in replaceable:
            try:
                with run.lease():
                    self._finish(run, trial, stopped=stopped)
            except RunBusyError:
                return
        del self.unrecorded[trial.index]
        self.tally.count(trial)

    def _finish(self, run: Run, trial: Trial, *, stopped: bool) -> None:
        """Write the end of a trial into its run: stopped early, or failed because its process died."""
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


def _run(args: _TrialArgs) -> None:
    """Run in the process of a trial: report the committed metric to Tune, then run the trial if it is remaining.

    A PoiseError is reported to the driver, since the run may have no record of it. Any other error is raised to Tune,
    which may start another attempt.
    """
    sweep = args.sweep
    spec = args.spec
    if Path(args.folder).is_dir():
        os.chdir(args.folder)
    else:
        spec = spec.model_copy(update={"store": args.store})
    run = located(spec)
    reporter = _Reporter(sweep)
    if reporter.compares:
        for point in history(sweep, run, reported=not args.remaining):
            reporter.report_point(point)
    if not args.remaining:
        return
    _wait_until_free(spec)
    try:
        _start(spec, reporter)
    except PoiseError as error:
        tune.report({"error": str(error)})


def _start(spec: RunSpec, reporter: _Reporter) -> None:
    """Run a trial to its end, in this process or on a worker group."""
    from poise.engine.ray.metrics import RaySink

    if _is_single_process(spec):
        from poise.engine.local import run_local

        run_local(spec, reporter, RaySink())
    else:
        from poise.engine.ray.worker_group import run_worker_group

        run_worker_group(spec, reporter, RaySink(), on_group=reporter.report_group)


def _wait_until_free(spec: RunSpec) -> None:
    """Wait while the process of a driver that died still holds the lease of the trial."""
    run = located(spec)
    deadline = time.monotonic() + _FREE_WITHIN_S
    while Lease.is_held(run.storage, run.name) and time.monotonic() < deadline:
        time.sleep(0.5)


class _Reporter(Display):
    """A display that reports to Tune: every evaluation, the newest progress once a second, and every note.

    An evaluation with the same value as the one before is reported too, so that the scheduler compares a trial that
    makes no progress.
    """

    def __init__(self, spec: SweepSpec) -> None:
        super().__init__()
        self.compares = isinstance(spec.scheduler, AshaSpec)
        self.metric = spec.metric
        self.last_shown = 0.0

    def show(self, progress: Progress) -> None:
        value = progress.evaluation.get(self.metric)
        if self.compares and value is not None and math.isfinite(value):
            self.report_point(Point(progress.step, progress.epoch, value))
        elif not progress.evaluation and time.monotonic() - self.last_shown > _SHOWN_EVERY_S:
            self.last_shown = time.monotonic()
            tune.report({"progress": asdict(progress)})

    def report_point(self, point: Point) -> None:
        """Report an evaluation to the scheduler. Does not return if the scheduler stops the trial."""
        tune.report({"steps": point.step, "epochs": point.epoch, "metric": point.value})

    def report_group(self, group: PlacementGroup) -> None:
        """Report the placement group of the trial: the driver removes it if this process is killed."""
        tune.report({"group": group})

    def note(self, text: str) -> None:
        """Show a line in the terminal of the driver."""
        tune.report({"note": text})
