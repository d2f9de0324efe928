"""Tables and figures of sweeps: their trials, best first, and the metric against the varied values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poise.kinds.sweep.result import SweepResult, TrialResult
from poise.report.blocks import Cell, Column, RenderedFigure, Row, Section, Table, draw, number, percent
from poise.report.curves import COLORS, SPARE, label, ordered
from poise.report.figures import STYLE, WIDE, legend, new_figure
from poise.report.record import RunRecord, with_result
from poise.spec import ExactNumber

__all__ = ["SECTION"]

_IN_TERMINAL = 10
_PALETTE = [COLORS["linf"], COLORS["l2"], COLORS["l1"], COLORS["union"], *SPARE]


def _tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    for record, result in with_result(records, SweepResult):
        yield _table(record.name, result)


def _ranked(result: SweepResult) -> list[TrialResult]:
    """Trials from best to worst, those without the metric last."""
    sign = -1 if result.mode == "max" else 1
    return sorted(result.trials, key=lambda trial: math.inf if trial.metric is None else sign * trial.metric)


def _table(run: str, result: SweepResult) -> Table:
    trials = _ranked(result)
    metric = result.metric
    measures = _test_measures(trials)
    counts = _count_statuses(trials)
    on_test = result.judged_on == "test"
    chosen = "; chosen by the test: too good" if on_test else ""
    headings = [_shorten(path) for path in trials[0].values]
    headings.append(metric.rpartition(".")[2])
    headings += [f"test {label(name)}" for name in measures]
    rows = []
    for place, trial in enumerate(trials):
        is_best = trial.run == result.best and not on_test
        rows.append(_row(trial, metric, measures, is_best=is_best, in_terminal=place < _IN_TERMINAL))
    return Table(
        title=f"{run}: {counts}; best first, shares in percent{chosen}",
        caption=f"Trials of {run} ({counts}), best first, judged by {_judged_by(result, on_test)}. The columns "
        "of the test are of the selected checkpoint of a trial. Intervals are Wilson's at 95 %, of one measurement: "
        f"that of the first of {len(trials)} is not corrected for the choice.",
        heading="trial",
        columns=[Column(heading) for heading in headings],
        rows=rows,
    )


def _count_statuses(trials: Sequence[TrialResult]) -> str:
    """How many trials have finished, were stopped and have failed, as text."""
    counts = {status: sum(trial.status == status for trial in trials) for status in ("finished", "stopped", "failed")}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def _judged_by(result: SweepResult, on_test: bool) -> str:
    """The metric that decided the order of the trials; a warning where it is of the test."""
    if not on_test:
        return result.judged_by
    return f"{result.judged_by}. None is marked as the best, since no images are left that had no part in the choice"


def _test_measures(trials: Sequence[TrialResult]) -> list[str]:
    """The measures on the test split; with a single threat without average and union, which equal it."""
    names = {name for trial in trials for name in trial.test}
    summaries = {"robust/average", "robust/union"}
    threats = {name for name in names - summaries if name.startswith("robust/")}
    return ordered(names - summaries if len(threats) == 1 else names)


def _row(trial: TrialResult, metric: str, measures: Sequence[str], *, is_best: bool, in_terminal: bool) -> Row:
    step = f"step {trial.step:,}" if trial.step is not None else ""
    note = ", ".join(filter(None, [trial.status, step, trial.error or ""]))
    cells = [Cell(_text(value)) for value in trial.values.values()]
    cells.append(_measure_cell(metric, trial.metric, trial.num_examples, top=is_best))
    cells += [_measure_cell(name, trial.test.get(name), trial.num_tested) for name in measures]
    return Row(trial.run, note, cells, in_terminal)


def _measure_cell(name: str, value: float | None, examples: int | None, *, top: bool = False) -> Cell:
    """A share in percent with its interval over so many examples; any other measure as a number."""
    if not _is_share(name):
        return number(value, top=top)
    return percent(math.nan if value is None else value, examples or 0, top=top)


def _is_share(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in ("clean", "accuracy") or last.startswith("robust/")


def _text(value: Any) -> str:
    """A value as it was written; a section as its keys and values."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return str(value)


def _shorten(path: str) -> str:
    """The last two parts of a path, for narrow columns."""
    return ".".join(path.split(".")[-2:])


def _figures(records: Sequence[RunRecord]) -> Iterator[RenderedFigure | None]:
    caption = (
        "Every trial that has the metric, against the varied values. Lines join trials that differ in nothing else; "
        "crosses are trials that were stopped early."
    )
    for index, (record, result) in enumerate(with_result(records, SweepResult)):
        figure = _metric_panels(result.trials, result.metric)
        yield draw(f"sweep-{index}", f"{record.name}: {result.metric}", figure, caption)


@matplotlib.rc_context(STYLE)
def _metric_panels(trials: Sequence[TrialResult], metric: str) -> Figure | None:
    """A panel for each path of the space, with the metric against its values; None without a trial that has it."""
    measured = [trial for trial in trials if trial.metric is not None]
    if not measured:
        return None
    paths = list(measured[0].values)
    figure, first = new_figure(WIDE, 3.2 * math.ceil(len(paths) / 3), "", "")
    first.remove()  # the axes that a new figure has; each panel adds its own
    columns = min(3, len(paths))
    for index, path in enumerate(paths):
        axes = figure.add_subplot(math.ceil(len(paths) / columns), columns, index + 1, xlabel=path)
        axes.set_ylabel(metric if index % columns == 0 else "")
        _panel(axes, measured, path)
    return figure


def _panel(axes: Axes, trials: Sequence[TrialResult], path: str) -> None:
    """The metric against the values of one path.

    Trials that agree in all other paths form a group. Groups are drawn as lines, unless there are too many of them.
    """
    positions = _x_positions(axes, [_text(trial.values[path]) for trial in trials])
    groups: dict[str, list[_Point]] = {}
    for trial in trials:
        others = ", ".join(f"{_shorten(other)} {_text(v)}" for other, v in trial.values.items() if other != path)
        assert trial.metric is not None  # the caller leaves out the others
        point = _Point(positions[_text(trial.values[path])], trial.metric, trial.status)
        groups.setdefault(others, []).append(point)
    as_lines = len(groups) <= len(_PALETTE) and any(len(points) > 1 for points in groups.values())
    for index, (others, points) in enumerate(groups.items()):
        color = _PALETTE[index % len(_PALETTE)] if as_lines else _PALETTE[0]
        _draw_points(axes, sorted(points), color, others, as_line=as_lines)
    if as_lines and len(groups) > 1:
        legend(axes)
    # values over almost two decades, such as learning rates, would crowd at the left of a linear axis
    xs = [point.x for points in groups.values() for point in points]
    if min(xs) > 0 and max(xs) > 50 * min(xs):
        axes.set_xscale("log")


class _Point(NamedTuple):
    x: float
    metric: float
    status: str


def _x_positions(axes: Axes, texts: Sequence[str]) -> dict[str, float]:
    """The position of each value on the x axis: the numbers themselves, or, if one is no number, their index."""
    distinct = list(dict.fromkeys(texts))
    numbers = [_number(text) for text in distinct]
    positions = {text: value for text, value in zip(distinct, numbers, strict=True) if value is not None}
    if len(positions) < len(distinct):
        positions = {text: float(index) for index, text in enumerate(distinct)}
        axes.set_xticks(range(len(distinct)), distinct)
    return positions


def _draw_points(axes: Axes, points: Sequence[_Point], color: str, text: str, *, as_line: bool) -> None:
    """Draw one group of trials; those that were stopped early get a cross."""
    xs = [point.x for point in points]
    ys = [point.metric for point in points]
    axes.plot(xs, ys, color=color, lw=1.4 if as_line else 0, marker="o", markersize=4, label=text)
    stopped = [point for point in points if point.status == "stopped"]
    stopped_xs = [point.x for point in stopped]
    stopped_ys = [point.metric for point in stopped]
    axes.scatter(stopped_xs, stopped_ys, color=color, marker="x", s=60)


def _number(text: str) -> float | None:
    """The number that a text stands for in a spec; None where it is no number."""
    try:
        return float(ExactNumber(text))
    except ValueError:
        return None


SECTION = Section("Sweeps", SweepResult, _tables, _figures)
