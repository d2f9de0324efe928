"""Sweeps. The trials of a sweep are runs in the store, which alone determines the remaining trials and their results.

A trial is a pure function of the spec and its number, so a sweep resumes without any state of the driver that died:
trials that have ended are not run again; the others, and those that failed, go on from their last commit. The metric,
its mode and the scheduler may change between two executions: then the trials are judged by the new ones.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from poise.engine.lifecycle import claim, is_finished, located
from poise.env import launched_rank
from poise.errors import PoiseError
from poise.kinds import read_any_result
from poise.kinds.sweep.result import SweepResult, TrialResult
from poise.kinds.sweep.spec import SweepSpec, Trial
from poise.observe.progress import Display, Progress
from poise.observe.rows import read_rows
from poise.observe.sinks import Sink
from poise.spec import dump
from poise.store.parquet import to_parquet
from poise.store.result import require_result, write_result
from poise.store.runs import Run

__all__ = [
    "STOPPED_EARLY",
    "Execute",
    "Point",
    "Tally",
    "history",
    "is_concluded",
    "judgement",
    "keep_reports",
    "run_sweep",
    "run_trials_in_turn",
    "trial_result",
]

STOPPED_EARLY = "stopped early"
"""The event of a trial that its scheduler has stopped, with the judgement by which it was stopped."""
_REPORTS = "artifacts/reports.json"
"""The points that a stopped trial had reported, some of which were not committed yet."""


@dataclass(frozen=True)
class Point:
    """The value of a metric after `step` optimizer steps."""

    step: int
    epoch: float
    value: float


class Tally:
    """Counts and shows the trials that have ended. Keeps the errors that are not in the manifest of a trial."""

    def __init__(self, spec: SweepSpec, display: Display, ended: int) -> None:
        self.spec = spec
        self.display = display
        self.ended = ended
        self.errors: dict[str, str] = {}
        self._show()

    def fail(self, run: str, error: Exception) -> None:
        """Record the error that ended the trial of that name; it may have no manifest."""
        self.errors[run] = str(error) or type(error).__name__

    def count(self, trial: Trial) -> None:
        """Count a trial that has ended, and show its status with its metric or its error."""
        result = self.result(trial)
        self.ended += 1
        self.display.remove(result.run)
        values = ", ".join(f"{path} = {value}" for path, value in result.values.items())
        metric = f"{self.spec.metric} {result.metric:.4g}, " if result.metric is not None else ""
        self.display.note(f"[{result.run}] {result.status}: {result.error or metric + values}")
        self._show()

    def result(self, trial: Trial) -> TrialResult:
        """The result of a trial so far."""
        return trial_result(self.spec, trial, self.errors.get(trial.spec.name))

    def _show(self) -> None:
        count = self.spec.num_trials
        self.display.show(Progress(self.spec.name, "sweep", 0, 0, self.ended, count, unit="trials"))


Execute = Callable[[SweepSpec, Sequence[Trial], Tally, Sink], None]
"""Runs the remaining trials. The store or the tally records the end of each; a trial that fails does not raise."""


def judgement(spec: SweepSpec) -> dict[str, Any]:
    """The fields by which trials are compared and stopped. They may change while the name of the sweep stays."""
    return spec.model_dump(mode="json", include={"metric", "mode", "scheduler"})


def is_concluded(run: Run, spec: SweepSpec) -> bool:
    """Whether the result has every trial, none has failed, and the judgement is that of `spec`."""
    if not is_finished(run, spec):
        return False
    result = require_result(run, SweepResult)
    is_current = result.judgement == judgement(spec) and len(result.trials) == spec.num_trials
    return is_current and not result.failed


def run_sweep(spec: SweepSpec, display: Display, sink: Sink, execute: Execute) -> None:
    """Run every remaining trial and write the result. Does nothing for a sweep that is concluded.

    Trials that failed before are run again. Raises PoiseError when no trial has the metric.
    """
    run = located(spec)
    is_main = launched_rank()[0] == 0
    if is_concluded(run, spec):
        return
    if not is_main:
        display = Display(io.StringIO())  # only rank 0 prints
    with claim(run, spec, display.note) if is_main else nullcontext():
        if is_main:
            run.write("spec.yaml", dump(spec).encode())  # the judgement may have changed
        trials = spec.trials()
        remaining = [trial for trial in trials if not _has_ended(spec, trial)]
        tally = Tally(spec, display, len(trials) - len(remaining))
        execute(spec, remaining, tally, sink)
        if is_main:
            results = [tally.result(trial) for trial in trials]
            failed = sum(result.status == "failed" for result in results)
            if failed:
                note = f"{failed} of {len(results)} trials failed; the same command tries them again"
                display.note(f"[{spec.name}] {note}")
            _write(run, spec, results)


def run_trials_in_turn(spec: SweepSpec, remaining: Sequence[Trial], tally: Tally, sink: Sink) -> None:
    """Run the trials one after the other in this process, without Ray."""
    from poise.engine.local import run_local

    for trial in remaining:
        try:
            run_local(trial.spec, tally.display, sink)
        except Exception as error:  # noqa: BLE001 - the other trials are run, and the tally shows the error
            tally.fail(trial.spec.name, error)
        tally.count(trial)


def history(spec: SweepSpec, run: Run, *, reported: bool = False) -> list[Point]:
    """The committed values of a trial's metric, by step. Empty if the metric is a number of the result, not of rows.

    `reported` adds the values that a stopped trial had reported and not committed yet.
    """
    rows = spec.source.rows
    if rows is None:
        return []
    table = _rows(run).filter((pc.field("split") == rows) & (pc.field("name") == spec.metric))
    points = [Point(row["step"], row["epoch"], row["value"]) for row in table.to_pylist()]
    points += _reports(run, spec.metric) if reported else []
    by_step = {point.step: point for point in points if math.isfinite(point.value)}
    return [by_step[step] for step in sorted(by_step)]


def keep_reports(run: Run, spec: SweepSpec, points: Iterable[Point]) -> None:
    """Write the points that a stopped trial had reported. The driver calls this before it records the end."""
    reports = {"metric": spec.metric, "points": [asdict(point) for point in points]}
    run.write(_REPORTS, json.dumps(reports).encode())


def trial_result(spec: SweepSpec, trial: Trial, error: str | None = None) -> TrialResult:
    """The result of a trial, read from the store. It has failed if there is an `error`, or if its run has not ended."""
    run = located(trial.spec)
    source = spec.source
    manifest = run.manifest()
    status = manifest.status if manifest and manifest.status != "running" and error is None else "failed"
    points = history(spec, run, reported=status == "stopped")
    select = max if spec.mode == "max" else min
    best = select(points, key=lambda point: point.value, default=None)
    result = read_any_result(run)
    metric = best.value if best else None
    if best is None and result and source.rows is None:
        metric = result.number(spec.metric)
    test = _rows(run).filter(pc.field("split") == "test").to_pylist()
    message = error or (manifest.error if manifest else None)
    if not message and status == "failed":
        message = "it was cut off; the same command goes on with it"
    return TrialResult(
        run=run.name,
        status=status,
        values=dict(trial.values),
        metric=metric,
        step=best.step if best else None,
        test={row["name"]: row["value"] for row in test if math.isfinite(row["value"])},
        error=message or None,
        num_examples=result.num_examples_of(source.examples) if result else None,
        num_tested=result.num_examples_of("test") if result else None,
    )


def _has_ended(spec: SweepSpec, trial: Trial) -> bool:
    """Whether a trial is finished, or was stopped by the judgement of `spec`."""
    run = located(trial.spec)
    if is_finished(run, trial.spec):
        return True
    manifest = run.manifest()
    if manifest is None or manifest.status != "stopped":
        return False
    judgements = [event.get("judgement") for event in run.events() if event["event"] == STOPPED_EARLY]
    return not judgements or judgements[-1] in (None, judgement(spec))


def _rows(run: Run) -> pa.Table:
    """All committed metric rows of a run."""
    return read_rows(run.read(name) for name in run.committed_files("metrics/") if name.endswith(".parquet"))


def _reports(run: Run, metric: str) -> list[Point]:
    """The points that `keep_reports` wrote; empty if there are none, or if they are of another metric."""
    try:
        reports = json.loads(run.read(_REPORTS))
    except FileNotFoundError:
        return []
    return [Point(**point) for point in reports["points"]] if reports["metric"] == metric else []


def _write(run: Run, spec: SweepSpec, results: Sequence[TrialResult]) -> None:
    """Write the table of all trials as Parquet, and the result of the sweep with its best trial.

    The values of the trials are columns of text, since a value may be a fraction such as 8/255. Raises PoiseError when
    no trial has the metric.
    """
    candidates = [result for result in results if result.metric is not None and result.status != "failed"]
    if not candidates:
        ended = [result.run for result in results if result.status != "failed"]
        if ended:
            raise PoiseError(f"no trial has a finite {spec.metric!r}; {ended[0]} came to its end without one")
        raise PoiseError(f"all {len(results)} trials have failed; {results[0].run}: {results[0].error}")
    select = max if spec.mode == "max" else min
    best = select(candidates, key=lambda result: result.metric or 0.0)
    columns: dict[str, list[Any]] = {}
    for key in ("run", "status", "metric", "step", "error"):
        columns[key] = [getattr(result, key) for result in results]
    for path in results[0].values:
        columns[path] = [str(result.values[path]) for result in results]
    run.write("artifacts/trials.parquet", to_parquet(pa.table(columns)))
    sweep_result = SweepResult(
        run=spec.name,
        seed=spec.seed,
        metric=spec.metric,
        mode=spec.mode,
        judgement=judgement(spec),
        judged_by=spec.judged_by(),
        judged_on=spec.source.examples,
        best=best.run,
        failed=[result.run for result in results if result.status == "failed"],
        trials=list(results),
        parts=[result.run for result in results],
    )
    write_result(run, sweep_result)
