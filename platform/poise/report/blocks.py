"""What a page is made of, whatever the kind of run: grids of cells, and figures. A terminal prints the same grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from poise.report import figures
from poise.report.record import RunRecord
from poise.stats import wilson

__all__ = ["Cell", "Column", "Drawn", "Grid", "Line", "Section", "draw", "number", "percent", "warning_grids"]


@dataclass(frozen=True)
class Cell:
    """A value as text, what stands below it in small print (an interval), and whether it is the best of its column."""

    text: str
    below: str = ""
    top: bool = False


@dataclass(frozen=True)
class Column:
    """The heading of a column of numbers.

    `colour` (CSS) ties it to a line of a figure; a column that is not `brief` is on the page only. A column of `prose`
    holds sentences, which are broken into lines and never cut.
    """

    label: str
    colour: str = ""
    brief: bool = True
    prose: bool = False


@dataclass(frozen=True)
class Line:
    """One line: its heading, small print below that, and a cell per column. A terminal shows only the `selected`."""

    head: str
    note: str
    cells: Sequence[Cell]
    selected: bool = True


@dataclass(frozen=True)
class Grid:
    """A table: `title` for a terminal, `caption` (a sentence or two: unit, intervals, protocol) for the page."""

    title: str
    caption: str
    heading: str
    columns: Sequence[Column]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Drawn:
    """A figure on its way into the page."""

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """How one kind of run is shown: grids and figures of all its runs beside each other, and figures of each alone.

    `unit` is what its speed counts.
    """

    title: str
    grids: Callable[[Sequence[RunRecord]], Iterable[Grid]]
    drawings: Callable[[Sequence[RunRecord]], Iterable[Drawn | None]]
    details: Callable[[str, RunRecord], Iterable[Drawn | None]]
    unit: str = "images"


def warning_grids(records: Sequence[RunRecord]) -> Iterator[Grid]:
    """One grid with the warnings of all these runs, or none."""
    doubts = [(record, words) for record in records for words in record.summary.get("warnings") or ()]
    if doubts:
        lines = [Line(record.name, "", [Cell(words)]) for record, words in doubts]
        columns = [Column("warning", prose=True)]
        yield Grid("Warnings", "What should make one doubt these results.", "run", columns, lines)


def draw(name: str, title: str, figure: Figure | None, caption: str) -> Drawn | None:
    """A figure as SVG; `name` is unique in the page. None where there is nothing to draw."""
    if figure is None:
        return None
    return Drawn(title, Markup(figures.to_svg(figure, name, f"{title}. {caption}")), caption)


def percent(share: float, examples: int = 0, *, top: bool = False) -> Cell:
    """A share in [0, 1] in percent, with its 95% Wilson interval over `examples`; a dash for what is not finite."""
    if not math.isfinite(share):
        return Cell("\u2013")
    low, high = wilson(share, examples) if examples else (math.nan, math.nan)
    return Cell(f"{100 * share:.1f}", f"{100 * low:.1f}\u2013{100 * high:.1f}" if examples else "", top)


def number(
    value: float | None, interval: Sequence[float] | None = None, *, form: str = ".3f", top: bool = False
) -> Cell:
    """A number in `form`, with an interval if there is one; a dash for None and for what is not finite."""
    if value is None or not math.isfinite(value):
        return Cell("\u2013")
    return Cell(format(value, form), "\u2013".join(format(end, form) for end in interval or ()), top)
