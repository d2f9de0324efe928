"""A sweep: its trials are runs of the store, and the store alone says which of them are left and what came out.

A trial is a pure function of the spec and its number, so a driver that died leaves nothing behind that the next one
needs: trials that have ended are not run again, and the others go on from their last commit.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from poise.engine.session import claim, is_finished, located
from poise.env import launched_rank
from poise.errors import PoiseError, UserError
from poise.kinds.specs.sweep import SweepSpec, Trial
from poise.observe.progress import Display, Progress
from poise.observe.rows import read_rows
from poise.observe.sinks import Sink
from poise.spec.problems import nearest
from poise.store.runs import Run

__all__ = ["Execute", "Outcome", "Point", "Tally", "history", "in_turn", "outcome", "run_sweep"]

_HELD_OUT = ("validation", "test", "train")
"""Where a metric is looked for, in this order: the test chooses among trials only where nothing else can."""


@dataclass(frozen=True)
class Point:
    """The value of a metric after `step` optimizer steps."""

    step: int
    epoch: float
    value: float


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: `metric` is the best value that it reached, at `step`; `test` its test metrics by name."""

    run: str
    status: str
    values: dict[str, Any]
    metric: float | None
    step: int | None
    test: dict[str, float]
    error: str | None = None


class Tally:
    """Counts the trials that have ended, and shows it."""

    def __init__(self, spec: SweepSpec, display: Display, ended: int) -> None:
        self.spec, self.display, self.ended = spec, display, ended
        self._show()

    def count(self, trial: Trial) -> None:
        """A trial has ended: say how."""
        found = outcome(self.spec, trial)
        self.ended += 1
        self.display.remove(found.run)
        values = ", ".join(f"{path} = {value}" for path, value in found.values.items())
        metric = f"{self.spec.metric} {found.metric:.4g}, " if found.metric is not None else ""
        self.display.note(f"[{found.run}] {found.status}: {found.error or metric + values}")
        self._show()

    def _show(self) -> None:
        count = self.spec.num_trials
        self.display.show(Progress(self.spec.name, "sweep", 0, 0, self.ended, count, unit="trials"))


Execute = Callable[[SweepSpec, Sequence[Trial], Tally, Sink], None]
"""Runs the trials that are left, each to an end that the store records; a trial that fails is no reason to raise."""


def run_sweep(spec: SweepSpec, display: Display, sink: Sink, execute: Execute) -> None:
    """Bring every trial to its end, and keep what came out. A finished sweep is left as it is.

    Raises PoiseError when no trial has the metric: all have failed, or it is called otherwise.
    """
    run, leads = located(spec), launched_rank()[0] == 0
    if is_finished(run, spec):
        return
    with claim(run, spec) if leads else nullcontext():
        trials = spec.trials()
        left = [trial for trial in trials if not _has_ended(trial)]
        execute(spec, left, Tally(spec, display, len(trials) - len(left)), sink)
        if leads:
            _keep(run, spec, [outcome(spec, trial) for trial in trials])


def in_turn(spec: SweepSpec, left: Sequence[Trial], tally: Tally, sink: Sink) -> None:
    """Without Ray: one trial after the other in this process."""
    from poise.engine.local import run_local

    if spec.scheduler.name != "none":
        raise UserError("trials that run one after the other cannot stop each other: use --engine ray, or no scheduler")
    for trial in left:
        with suppress(Exception):  # the trial's own record says what it was, and the others go on
            run_local(trial.spec, tally.display, sink)
        tally.count(trial)


def history(spec: SweepSpec, run: Run) -> list[Point]:
    """The metric of a trial in the order of its steps, as far as it is committed."""
    rows = _rows(run)
    for split in _HELD_OUT:
        found = rows.filter((pc.field("split") == split) & (pc.field("name") == spec.metric))
        if len(found):
            points = (Point(row["step"], row["epoch"], row["value"]) for row in found.to_pylist())
            return [point for point in points if math.isfinite(point.value)]
    return []


def outcome(spec: SweepSpec, trial: Trial) -> Outcome:
    """What the store knows of a trial. One that no driver has brought to an end has failed."""
    run = located(trial.spec)
    manifest, points = run.manifest(), history(spec, run)
    pick = max if spec.mode == "max" else min
    best = pick(points, key=lambda point: point.value, default=None)
    value = best.value if best else _summarised(run, spec.metric)
    test = _rows(run).filter(pc.field("split") == "test").to_pylist()
    status = manifest.status if manifest and manifest.status != "running" else "failed"
    return Outcome(
        run=run.name,
        status=status,
        values=trial.values,
        metric=value,
        step=best.step if best else None,
        test={row["name"]: row["value"] for row in test if math.isfinite(row["value"])},
        error=(manifest.error if manifest else None) or ("it has no end" if status == "failed" else None),
    )


def _has_ended(trial: Trial) -> bool:
    run = located(trial.spec)
    known = run.manifest()
    return is_finished(run, trial.spec) or (known is not None and known.status == "stopped")


def _rows(run: Run) -> pa.Table:
    return read_rows(run.read(name) for name in run.committed_files("metrics/") if name.endswith(".parquet"))


def _summarised(run: Run, path: str) -> float | None:
    """The number at a dotted path of the summary of a run."""
    try:
        value = json.loads(run.read("artifacts/summary.json"))
    except FileNotFoundError:
        return None
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _keep(run: Run, spec: SweepSpec, found: Sequence[Outcome]) -> None:
    """The table of all trials as Parquet, values as text as they were written, and the summary with the best."""
    judged = [one for one in found if one.metric is not None and one.status != "failed"]
    if not judged:
        raise PoiseError(_why_nothing(spec, found))
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
        "best": best.run,
        "failed": [one.run for one in found if one.status == "failed"],
        "trials": [asdict(one) for one in found],
    }
    run.write("artifacts/summary.json", json.dumps(summary, indent=1).encode())


def _why_nothing(spec: SweepSpec, found: Sequence[Outcome]) -> str:
    ended = [one for one in found if one.status != "failed"]
    if not ended:
        return f"all {len(found)} trials have failed; {found[0].run}: {found[0].error}"
    names = {str(name) for trial in spec.trials() for name in _rows(located(trial.spec))["name"].to_pylist()}
    return f"no trial has the metric {spec.metric!r}; {nearest(spec.metric, names)}"
