"""A sweep: its trials are runs of the store, and the store alone says which of them are left and what came out.

A trial is a pure function of the spec and its number, so a driver that died leaves nothing behind that the next one
needs: trials that have ended are not run again, and the others go on from their last commit. So do those that failed,
and by what trials are judged may change: they are judged anew.
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
import pyarrow.parquet as pq

from poise.engine.session import claim, is_finished, located
from poise.env import launched_rank
from poise.errors import PoiseError
from poise.kinds.specs.sweep import SweepSpec, Trial
from poise.observe.progress import Display, Progress
from poise.observe.rows import read_rows
from poise.observe.sinks import Sink
from poise.spec import MetricSource, dump
from poise.store.runs import Run

__all__ = [
    "STOPPED_EARLY",
    "Execute",
    "Outcome",
    "Point",
    "Tally",
    "history",
    "in_turn",
    "is_concluded",
    "judgement",
    "keep_reports",
    "outcome",
    "run_sweep",
]

STOPPED_EARLY = "stopped early"
"""The event in the record of a trial that its scheduler has stopped; it says by what that was decided."""
_REPORTS = "artifacts/reports.json"
"""What a trial that was stopped had reported by then: some of it was not committed yet."""


@dataclass(frozen=True)
class Point:
    """The value of a metric after `step` optimizer steps."""

    step: int
    epoch: float
    value: float


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: `metric` is the best value that it reached, at `step`; `test` its test metrics by name.

    `examples` and `tested` count the examples that the metric and the test metrics are means over, where that is known.
    """

    run: str
    status: str
    values: dict[str, Any]
    metric: float | None
    step: int | None
    test: dict[str, float]
    error: str | None = None
    examples: int | None = None
    tested: int | None = None


class Tally:
    """Counts the trials that have ended, and shows it; keeps the errors that the record of a trial does not have."""

    def __init__(self, spec: SweepSpec, display: Display, ended: int) -> None:
        self.spec, self.display, self.ended = spec, display, ended
        self.errors: dict[str, str] = {}
        self._show()

    def fail(self, run: str, error: Exception) -> None:
        """A trial could not be brought to its end, perhaps not even begun: `error` says why."""
        self.errors[run] = str(error) or type(error).__name__

    def count(self, trial: Trial) -> None:
        """A trial has ended: say how."""
        found = self.outcome(trial)
        self.ended += 1
        self.display.remove(found.run)
        values = ", ".join(f"{path} = {value}" for path, value in found.values.items())
        metric = f"{self.spec.metric} {found.metric:.4g}, " if found.metric is not None else ""
        self.display.note(f"[{found.run}] {found.status}: {found.error or metric + values}")
        self._show()

    def outcome(self, trial: Trial) -> Outcome:
        """What has come of a trial by now."""
        return outcome(self.spec, trial, self.errors.get(trial.spec.name))

    def _show(self) -> None:
        count = self.spec.num_trials
        self.display.show(Progress(self.spec.name, "sweep", 0, 0, self.ended, count, unit="trials"))


Execute = Callable[[SweepSpec, Sequence[Trial], Tally, Sink], None]
"""Runs the trials that are left, each to an end that the store or the tally records; one that fails raises nothing."""


def judgement(spec: SweepSpec) -> dict[str, Any]:
    """By what trials are compared and stopped; it may change under the name of a sweep."""
    return spec.model_dump(mode="json", include={"metric", "mode", "scheduler"})


def is_concluded(run: Run, spec: SweepSpec) -> bool:
    """Whether nothing is left to do: every trial is there, none has failed, and all were judged as `spec` says."""
    if not is_finished(run, spec):
        return False
    summary = _summary(run)
    same = summary["judgement"] == judgement(spec) and len(summary["trials"]) == spec.num_trials
    return same and not summary["failed"]


def run_sweep(spec: SweepSpec, display: Display, sink: Sink, execute: Execute) -> None:
    """Bring every trial to its end, and keep what came out. A sweep of which nothing is left is left as it is.

    Trials that failed before are tried again. Raises PoiseError when no trial has the metric.
    """
    run, leads = located(spec), launched_rank()[0] == 0
    if is_concluded(run, spec):
        return
    if not leads:
        display = Display(io.StringIO())  # one process speaks for all
    with claim(run, spec, display.note) if leads else nullcontext():
        if leads:
            run.write("spec.yaml", dump(spec).encode())  # by what trials are judged may have changed
        trials = spec.trials()
        left = [trial for trial in trials if not _has_ended(spec, trial)]
        tally = Tally(spec, display, len(trials) - len(left))
        execute(spec, left, tally, sink)
        if leads:
            found = [tally.outcome(trial) for trial in trials]
            failed = sum(one.status == "failed" for one in found)
            if failed:
                note = f"{failed} of {len(found)} trials failed; the same command tries them again"
                display.note(f"[{spec.name}] {note}")
            _keep(run, spec, found)


def in_turn(spec: SweepSpec, left: Sequence[Trial], tally: Tally, sink: Sink) -> None:
    """Without Ray: one trial after the other in this process."""
    from poise.engine.local import run_local

    for trial in left:
        try:
            run_local(trial.spec, tally.display, sink)
        except Exception as error:  # noqa: BLE001 - the others go on, and the error is told with the trial
            tally.fail(trial.spec.name, error)
        tally.count(trial)


def history(spec: SweepSpec, run: Run, *, reported: bool = False) -> list[Point]:
    """The metric of a trial in the order of its steps, as far as it is committed; empty for one of the summary.

    `reported` adds what a trial that was stopped had reported and not committed yet.
    """
    rows = spec.source.rows
    if rows is None:
        return []
    found = _rows(run).filter((pc.field("split") == rows) & (pc.field("name") == spec.metric))
    points = [Point(row["step"], row["epoch"], row["value"]) for row in found.to_pylist()]
    points += _reports(run, spec.metric) if reported else []
    by_step = {point.step: point for point in points if math.isfinite(point.value)}
    return [by_step[step] for step in sorted(by_step)]


def keep_reports(run: Run, spec: SweepSpec, points: Iterable[Point]) -> None:
    """Write what a trial had reported when it was stopped; its driver does, before it records the end."""
    reports = {"metric": spec.metric, "points": [asdict(point) for point in points]}
    run.write(_REPORTS, json.dumps(reports).encode())


def outcome(spec: SweepSpec, trial: Trial, error: str | None = None) -> Outcome:
    """What the store knows of a trial. One that no driver has brought to an end has failed, with `error` if given."""
    run, source = located(trial.spec), spec.source
    manifest = run.manifest()
    status = manifest.status if manifest and manifest.status != "running" and error is None else "failed"
    points = history(spec, run, reported=status == "stopped")
    pick = max if spec.mode == "max" else min
    best = pick(points, key=lambda point: point.value, default=None)
    summary = _summary(run)
    test = _rows(run).filter(pc.field("split") == "test").to_pylist()
    told = error or (manifest.error if manifest else None)
    return Outcome(
        run=run.name,
        status=status,
        values=trial.values,
        metric=best.value if best else _number(summary, spec.metric) if source.rows is None else None,
        step=best.step if best else None,
        test={row["name"]: row["value"] for row in test if math.isfinite(row["value"])},
        error=told or ("it was cut off; the same command goes on with it" if status == "failed" else None),
        examples=_examples(summary, source),
        tested=_examples(summary, MetricSource("test", "test")),
    )


def _has_ended(spec: SweepSpec, trial: Trial) -> bool:
    """Whether nothing is left of a trial: it is finished, or was stopped by the judgement that still holds."""
    run = located(trial.spec)
    if is_finished(run, trial.spec):
        return True
    known = run.manifest()
    if known is None or known.status != "stopped":
        return False
    decided = [event.get("judgement") for event in run.events() if event["event"] == STOPPED_EARLY]
    return not decided or decided[-1] in (None, judgement(spec))


def _rows(run: Run) -> pa.Table:
    return read_rows(run.read(name) for name in run.committed_files("metrics/") if name.endswith(".parquet"))


def _reports(run: Run, metric: str) -> list[Point]:
    try:
        reports = json.loads(run.read(_REPORTS))
    except FileNotFoundError:
        return []
    return [Point(**point) for point in reports["points"]] if reports["metric"] == metric else []


def _summary(run: Run) -> dict[str, Any]:
    try:
        return dict(json.loads(run.read("artifacts/summary.json")))
    except FileNotFoundError:
        return {}


def _number(summary: Any, path: str) -> float | None:
    """The number at a dotted path of the summary of a run."""
    value = summary
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _examples(summary: dict[str, Any], source: MetricSource) -> int | None:
    """How many examples a metric is a mean over, as far as the summary of a run says."""
    if source.examples == "train":
        return None
    held_out = source.examples == "validation" and "validation_examples" in summary
    count = summary.get("validation_examples" if held_out else "examples")
    return count if isinstance(count, int) else None


def _keep(run: Run, spec: SweepSpec, found: Sequence[Outcome]) -> None:
    """The table of all trials as Parquet, values as text as they were written, and the summary with the best."""
    judged = [one for one in found if one.metric is not None and one.status != "failed"]
    if not judged:
        ended = [one.run for one in found if one.status != "failed"]
        if ended:
            raise PoiseError(f"no trial has a finite {spec.metric!r}; {ended[0]} came to its end without one")
        raise PoiseError(f"all {len(found)} trials have failed; {found[0].run}: {found[0].error}")
    best = (max if spec.mode == "max" else min)(judged, key=lambda one: one.metric or 0.0)
    columns: dict[str, list[Any]] = {
        key: [getattr(one, key) for one in found] for key in ("run", "status", "metric", "step", "error")
    }
    columns |= {path: [str(one.values[path]) for one in found] for path in found[0].values}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    run.write("artifacts/trials.parquet", sink.getvalue())
    summary = {
        "run": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "metric": spec.metric,
        "mode": spec.mode,
        "judgement": judgement(spec),
        "judged_by": spec.judged_by(),
        "judged_on": spec.source.examples,
        "best": best.run,
        "failed": [one.run for one in found if one.status == "failed"],
        "trials": [asdict(one) for one in found],
    }
    run.write("artifacts/summary.json", json.dumps(summary, indent=1).encode())
