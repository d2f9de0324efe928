"""How sweeps are shown: their trials, best first, and the metric against what was varied."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poise.report.blocks import Cell, Column, Drawn, Grid, Line, Section, draw, number, percent
from poise.report.curves import COLOURS, SPARE, label, ordered
from poise.report.figures import STYLE, WIDE, canvas, legend
from poise.report.record import RunRecord
from poise.spec import Real

__all__ = ["SECTION"]

_IN_TERMINAL = 10
_LINES = [tone for name, tone in COLOURS.items() if name in ("linf", "l2", "l1", "union")] + list(SPARE)

Trial = Mapping[str, Any]


def _grids(records: Sequence[RunRecord]) -> Iterator[Grid]:
    for record in filter(_trials, records):
        yield _grid(record, _ranked(record))


def _trials(record: RunRecord) -> Sequence[Trial]:
    return record.summary.get("trials") or ()


def _ranked(record: RunRecord) -> list[Trial]:
    """Trials from best to worst, those without the metric last."""
    sign = -1 if record.summary.get("mode") == "max" else 1
    return sorted(_trials(record), key=lambda trial: math.inf if trial["metric"] is None else sign * trial["metric"])


def _grid(record: RunRecord, trials: Sequence[Trial]) -> Grid:
    metric = str(record.summary.get("metric"))
    paths = list(trials[0]["values"])
    measures = _measures(trials)
    ends = {status: sum(trial["status"] == status for trial in trials) for status in ("finished", "stopped", "failed")}
    counts = ", ".join(f"{count} {status}" for status, count in ends.items() if count)
    on_test = record.summary.get("judged_on") == "test"
    chosen = "; chosen by the test: too good" if on_test else ""
    return Grid(
        title=f"{record.name}: {counts}; best first, shares in percent{chosen}",
        caption=f"Trials of {record.name} ({counts}), best first, judged by {_judged_by(record, on_test)}. The columns "
        "of the test are of the selected checkpoint of a trial. Intervals are Wilson's at 95 %, of one measurement: "
        f"that of the first of {len(trials)} is not corrected for the choice.",
        heading="trial",
        columns=[
            Column(text)
            for text in [*map(_short, paths), metric.rpartition(".")[2], *(f"test {label(name)}" for name in measures)]
        ],
        lines=[
            _line(
                trial,
                metric,
                measures,
                best=trial["run"] == record.summary.get("best") and not on_test,
                shown=place < _IN_TERMINAL,
            )
            for place, trial in enumerate(trials)
        ],
    )


def _judged_by(record: RunRecord, on_test: bool) -> str:
    """By what the order of the trials was decided, and what follows from that."""
    words = str(record.summary.get("judged_by") or record.summary.get("metric"))
    if not on_test:
        return words
    return f"{words}. None is marked as the best, since no images are left that had no part in the choice"


def _measures(trials: Sequence[Trial]) -> list[str]:
    """What was measured on the test; without the summaries of a single threat, which they equal."""
    names = {name for trial in trials for name in trial["test"]}
    summaries = {"robust/average", "robust/union"}
    alone = len({name for name in names - summaries if name.startswith("robust/")}) == 1
    return ordered(names - summaries if alone else names)


def _line(trial: Trial, metric: str, measures: Sequence[str], *, best: bool, shown: bool) -> Line:
    step = f"step {trial['step']:,}" if trial["step"] is not None else ""
    note = ", ".join(filter(None, [trial["status"], step, trial["error"] or ""]))
    values = [Cell(_text(value)) for value in trial["values"].values()]
    tested = [_measure(name, trial["test"].get(name), trial.get("tested")) for name in measures]
    judged = _measure(metric, trial["metric"], trial.get("examples"), top=best)
    return Line(trial["run"], note, [*values, judged, *tested], shown)


def _measure(name: str, value: float | None, examples: int | None, *, top: bool = False) -> Cell:
    """A share in percent with its interval over so many examples, anything else as a number."""
    if not _is_share(name):
        return number(value, top=top)
    return percent(math.nan if value is None else value, examples or 0, top=top)


def _is_share(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in ("clean", "accuracy") or last.startswith("robust/")


def _text(value: Any) -> str:
    """A value as it was written; of a section only what it says."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return str(value)


def _short(path: str) -> str:
    """The last two parts of a path: enough to tell, and narrow."""
    return ".".join(path.split(".")[-2:])


def _drawings(records: Sequence[RunRecord]) -> Iterator[Drawn | None]:
    for index, record in enumerate(filter(_trials, records)):
        metric = str(record.summary.get("metric"))
        yield draw(f"sweep-{index}", f"{record.name}: {metric}", _against(_trials(record), metric),
                   "Every trial that has the metric, against what was varied; lines join those otherwise alike, "
                   "crosses are trials that were stopped early.")  # fmt: skip


@matplotlib.rc_context(STYLE)
def _against(trials: Sequence[Trial], metric: str) -> Figure | None:
    """A panel for each swept path; None without a trial that has the metric."""
    judged = [trial for trial in trials if trial["metric"] is not None]
    if not judged:
        return None
    paths = list(judged[0]["values"])
    figure, first = canvas(WIDE, 3.2 * math.ceil(len(paths) / 3), "", "")
    first.remove()
    columns = min(3, len(paths))
    for index, path in enumerate(paths):
        axes = figure.add_subplot(math.ceil(len(paths) / columns), columns, index + 1, xlabel=path)
        axes.set_ylabel(metric if index % columns == 0 else "")
        _panel(axes, judged, path)
    return figure


def _panel(axes: Axes, trials: Sequence[Trial], path: str) -> None:
    """The metric against one path. Trials that differ in nothing else are a line, where there are few of them."""
    ticks = list(dict.fromkeys(_text(trial["values"][path]) for trial in trials))
    places = {text: _number(text) for text in ticks}
    if None in places.values():
        places = {text: float(index) for index, text in enumerate(ticks)}
        axes.set_xticks(range(len(ticks)), ticks)
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for trial in trials:
        others = ", ".join(f"{_short(p)} {_text(value)}" for p, value in trial["values"].items() if p != path)
        point = (places[_text(trial["values"][path])] or 0.0, trial["metric"], trial["status"])
        groups.setdefault(others, []).append(point)
    joined = len(groups) <= len(_LINES) and any(len(points) > 1 for points in groups.values())
    for index, (others, points) in enumerate(groups.items()):
        _points(axes, sorted(points), _LINES[index % len(_LINES)] if joined else _LINES[0], others, joined)
    if joined and len(groups) > 1:
        legend(axes)
    xs = [x for points in groups.values() for x, _, _ in points]
    if min(xs) > 0 and max(xs) > 50 * min(xs):
        axes.set_xscale("log")


def _points(axes: Axes, points: Sequence[tuple[float, float, str]], tone: str, text: str, joined: bool) -> None:
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    axes.plot(xs, ys, color=tone, lw=1.4 if joined else 0, marker="o", markersize=4, label=text)
    stopped = [(x, y) for x, y, status in points if status == "stopped"]
    axes.scatter([x for x, _ in stopped], [y for _, y in stopped], color=tone, marker="x", s=60)


def _number(text: str) -> float | None:
    """The number that a value stands for, exactly as a spec reads it."""
    try:
        return float(Real(text))
    except ValueError:
        return None


SECTION = Section("Sweeps", _grids, _drawings, lambda anchor, record: ())
