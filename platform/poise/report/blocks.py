"""The parts of a page, for runs of any kind: tables of cells, and figures. A terminal prints the same tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from poise.report import figures
from poise.report.record import RunRecord
from poise.stats import wilson
from poise.store.result import RunResult

__all__ = [
    "Cell",
    "Column",
    "RenderedFigure",
    "Row",
    "Section",
    "Table",
    "draw",
    "metric_tables",
    "number",
    "percent",
    "warning_tables",
]

_METRIC = "metric/"
"""The prefix of the names of metrics of the user's code."""


@dataclass(frozen=True)
class Cell:
    """A value as text, the small print below it (an interval), and whether it is the best of its column."""

    text: str
    below: str = ""
    top: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        label: its heading.
        color: CSS colour of the line in a figure that shows the same measure.
        in_terminal: whether a terminal shows the column; the page shows all columns.
        prose: it holds sentences, which are wrapped and never truncated.
    """

    label: str
    color: str = ""
    in_terminal: bool = True
    prose: bool = False


@dataclass(frozen=True)
class Row:
    """One row: its heading, small print below it, and a cell per column. A terminal shows only `selected` rows."""

    head: str
    note: str
    cells: Sequence[Cell]
    selected: bool = True


@dataclass(frozen=True)
class Table:
    """A table: `title` for a terminal, `caption` (a sentence or two: unit, intervals, protocol) for the page."""

    title: str
    caption: str
    heading: str
    columns: Sequence[Column]
    rows: Sequence[Row]


@dataclass(frozen=True)
class RenderedFigure:
    """A figure as SVG, with its title and caption."""

    title: str
    svg: Markup
    caption: str


def _no_figures(records: Sequence[RunRecord]) -> Iterable[RenderedFigure | None]:
    return ()


def _no_details(anchor: str, record: RunRecord) -> Iterable[RenderedFigure | None]:
    return ()


@dataclass(frozen=True)
class Section:
    """How the runs of one kind are shown.

    Attributes:
        title: heading of the section.
        result: class of the result of these runs.
        tables: tables that compare the given runs.
        rendered_figures: figures that compare the given runs.
        details: figures of one run; its anchor begins their names.
        unit: what the speed of a run counts, per second.
        drawn: training metrics that `details` draws, as patterns; the page draws all others by itself.
    """

    title: str
    result: type[RunResult]
    tables: Callable[[Sequence[RunRecord]], Iterable[Table]]
    rendered_figures: Callable[[Sequence[RunRecord]], Iterable[RenderedFigure | None]] = _no_figures
    details: Callable[[str, RunRecord], Iterable[RenderedFigure | None]] = _no_details
    unit: str = "images"
    drawn: Sequence[str] = ()


def warning_tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    """One table with the warnings of all these runs, or none."""
    rows = []
    for record in records:
        if record.result:
            rows += [Row(record.name, "", [Cell(warning)]) for warning in record.result.warnings]
    if rows:
        columns = [Column("warning", prose=True)]
        yield Table("Warnings", "Reasons to doubt these results.", "run", columns, rows)


def metric_tables(values: Mapping[str, Mapping[str, float]]) -> Iterator[Table]:
    """One table with the metrics of the user's code, from their values by run and by `metric/NAME`, or none."""
    names = list(dict.fromkeys(name for metrics in values.values() for name in metrics if name.startswith(_METRIC)))
    if not names:
        return
    rows = []
    for run, metrics in values.items():
        rows.append(Row(run, "", [number(metrics.get(name), form=".4g") for name in names]))
    caption = "Metrics of your code: means over the examples of the evaluation."
    yield Table("Metrics of your code", caption, "run", [Column(name.removeprefix(_METRIC)) for name in names], rows)


def draw(name: str, title: str, figure: Figure | None, caption: str) -> RenderedFigure | None:
    """A figure as SVG; `name` is unique in the page. None where there is nothing to draw."""
    if figure is None:
        return None
    return RenderedFigure(title, Markup(figures.to_svg(figure, name, f"{title}. {caption}")), caption)


def percent(share: float, examples: int = 0, *, top: bool = False) -> Cell:
    """A share in [0, 1] in percent, with its 95% Wilson interval over `examples`; a dash for what is not finite."""
    if not math.isfinite(share):
        return Cell("\u2013")
    interval = ""
    if examples:
        low, high = wilson(share, examples)
        interval = f"{100 * low:.1f}\u2013{100 * high:.1f}"
    return Cell(f"{100 * share:.1f}", interval, top)


def number(
    value: float | None, interval: Sequence[float] | None = None, *, form: str = ".3f", top: bool = False
) -> Cell:
    """A number in `form`, with an interval if there is one; a dash for None and for what is not finite."""
    if value is None or not math.isfinite(value):
        return Cell("\u2013")
    ends = [format(end, form) for end in interval or ()]
    return Cell(format(value, form), "\u2013".join(ends), top)
