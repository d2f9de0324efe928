"""The figures of the page, as matplotlib objects and as SVG that sits inside HTML.

Invariant: equal data gives equal SVG. Colours of text and of measures become CSS variables with the drawn colour as
fallback, so that a figure follows the light or dark theme of the page. Text stays text.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import matplotlib
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from poise.observe.names import PHASES
from poise.report.curves import COLORS, INK, SPARE, color_of, curve, label, names, ordered, phase_seconds
from poise.stats import wilson

__all__ = [
    "accuracy_curves",
    "css_color",
    "final_bars",
    "further_curves",
    "learning_rate",
    "legend",
    "loss_curves",
    "new_figure",
    "phase_bars",
    "plot",
    "speed",
    "to_svg",
    "weight_curves",
]

WIDE = 10.2
"""Width of a figure in inches that takes the whole width of the page."""
HALF = 5.0
"""Width in inches of one of two figures side by side; the ratio to WIDE gives both the same size of text."""

MUTED = "#6b7280"
GRID = "#e2e5ea"
_PHASE_PALETTE = ("#56b4e9", "#e69f00", "#d55e00", "#0072b2", "#009e73", "#cc79a7")
PHASE_COLORS = dict(zip(PHASES, _PHASE_PALETTE, strict=True))

VARIABLES = {hex_color: f"c-{hex_color[1:]}" for hex_color in (*COLORS.values(), *SPARE)}
VARIABLES |= {INK: "ink", MUTED: "muted", GRID: "grid"}
"""The name of the CSS variable of each colour."""

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.labelsize": 8.5,
    "ytick.major.size": 0,
}


def new_figure(width: float, height: float, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty figure of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.01)
    return figure, axes


def css_color(hex_color: str) -> str:
    """A colour of a figure as the value of a CSS property: its variable, with the colour itself as fallback."""
    return f"var(--{VARIABLES[hex_color]}, {hex_color})"


def legend(axes: Axes, handles: Sequence[Line2D] | None = None) -> None:
    """Add a legend of one row above the plot, where it hides no data."""
    handles = axes.get_lines() if handles is None else handles
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(handles),
        borderpad=0.2,
        borderaxespad=0.1,
        handlelength=1.5,
        columnspacing=1.4,
    )


def _swatch(color: str, text: str, alpha: float = 1.0) -> Line2D:
    """An entry of a legend: a filled box."""
    return Line2D([], [], color=color, alpha=alpha, lw=7, solid_capstyle="butt", label=text)


def plot(axes: Axes, rows: pa.Table, split: str, name: str, **style: Any) -> bool:
    """Draw one series against epochs; whether the run has it."""
    series = curve(rows, split, name).downsample()
    if not len(series):
        return False
    marker = "o" if len(series) == 1 else None  # a line of one point is invisible
    axes.plot(series.epochs, series.values, marker=marker, markersize=4, **style)
    return True


def _several(threats: list[str]) -> list[str]:
    """The threats; none where there is only one, which equals the whole objective and would be drawn twice."""
    return threats if len(threats) > 1 else []


@matplotlib.rc_context(STYLE)
def loss_curves(rows: pa.Table) -> Figure | None:
    """Training objective, its parts per threat, and validation loss over epochs; None without any."""
    figure, axes = new_figure(HALF, 2.9, "epoch", "loss (nats)")
    threats = _several(names(rows, "train", "loss/"))
    for threat in threats:
        plot(axes, rows, "train", f"loss/{threat}", color=color_of(threat, threats), lw=1.1, label=label(threat))
    plot(axes, rows, "train", "loss", color=INK, label="training objective")
    plot(axes, rows, "validation", "loss", color=INK, ls=(0, (3, 2)), lw=1.3, label="validation")
    if not axes.lines:
        return None
    legend(axes)
    return figure


@matplotlib.rc_context(STYLE)
def accuracy_curves(rows: pa.Table, best_step: int | None = None) -> Figure | None:
    """Clean, per-norm and union accuracy over epochs; None without any.

    The colour is the measure, the line style the split; a vertical line marks the best checkpoint.
    """
    figure, axes = new_figure(WIDE, 3.8, "epoch", "accuracy (%)")
    measures: dict[str, list[str]] = {}
    for split, style in (("validation", "-"), ("train", (0, (1, 1.4)))):
        accuracies = _accuracies(rows, split)
        width = 1.9 if split == "validation" else 1.2
        for measure, name in accuracies.items():
            plot(axes, rows, split, name, color=color_of(measure, list(accuracies)), ls=style, lw=width)
            measures.setdefault(measure, []).append(split)
    if not measures:
        return None
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=""))
    _mark_best(axes, rows, best_step)
    _accuracy_legend(axes, measures)
    return figure


def _accuracies(rows: pa.Table, split: str) -> dict[str, str]:
    """The names of the rows of accuracies, by measure.

    With a single threat, average and union are left out: they equal the accuracy under that threat.
    """
    accuracies: dict[str, str] = {}
    for name in names(rows, split, ""):
        if name in ("clean", "accuracy") or name.startswith("robust/"):
            accuracies[name.removeprefix("robust/")] = name
    threats = accuracies.keys() - {"clean", "accuracy", "average", "union"}
    if len(threats) == 1:
        return {measure: name for measure, name in accuracies.items() if measure not in ("average", "union")}
    return accuracies


def _mark_best(axes: Axes, rows: pa.Table, best_step: int | None) -> None:
    """Mark the validation of the best checkpoint by a vertical line."""
    best_rows = rows.filter((pc.field("split") == "validation") & (pc.field("step") == (best_step or 0)))
    if not len(best_rows):
        return
    epoch = best_rows["epoch"][0].as_py()
    axes.axvline(epoch, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1, gid="best")
    axes.annotate(
        f"best checkpoint (step {best_step:,})",
        (epoch, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 2),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=8.5,
    )


def _accuracy_legend(axes: Axes, measures: Mapping[str, Sequence[str]]) -> None:
    """One entry per measure and one per split; `measures` has the splits of each measure."""
    order = ordered(measures)
    handles = [Line2D([], [], color=color_of(measure, order), lw=1.9, label=label(measure)) for measure in order]
    splits = {split for measure_splits in measures.values() for split in measure_splits}
    if "validation" in splits:
        handles.append(Line2D([], [], color=MUTED, lw=1.9, label="validation"))
    if "train" in splits:
        handles.append(Line2D([], [], color=MUTED, lw=1.2, ls=(0, (1, 1.4)), label="training batches"))
    legend(axes, handles)


@matplotlib.rc_context(STYLE)
def weight_curves(rows: pa.Table) -> Figure | None:
    """Weight of every threat in the objective over epochs; None for fewer than two threats."""
    threats = _several(names(rows, "train", "weight/"))
    if not threats:
        return None
    figure, axes = new_figure(HALF, 2.9, "epoch", "weight in the objective")
    for threat in threats:
        plot(axes, rows, "train", f"weight/{threat}", color=color_of(threat, threats), label=label(threat))
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


@matplotlib.rc_context(STYLE)
def further_curves(rows: pa.Table, drawn: Sequence[str]) -> Figure | None:
    """Every metric of training that no other figure draws over epochs, in axes of its own; None without any.

    `drawn`: the names, as patterns, of those that the figures of the kind draw.
    """
    patterns = ("loss", "loss/*", "lr", "sum_lr", *drawn)
    further = [name for name in names(rows, "train", "") if not any(fnmatchcase(name, each) for each in patterns)]
    if not further:
        return None
    columns = min(3, len(further))
    lines = math.ceil(len(further) / columns)
    width = HALF if columns == 1 else WIDE
    figure = Figure(figsize=(width, 2.2 * lines), layout="constrained")
    for index, name in enumerate(further):
        axes = figure.add_subplot(lines, columns, index + 1, xlabel="epoch")
        axes.margins(x=0.01)
        axes.set_title(name, fontsize=9)
        plot(axes, rows, "train", name, color=INK)
    return figure


def learning_rate(rows: pa.Table) -> Figure | None:
    """Learning rate over time; None without it."""
    return _single(rows, "train", "lr", "learning rate")


def speed(rows: pa.Table) -> Figure | None:
    """Training examples per second over time; None without timings."""
    return _single(rows, "timing", "examples_per_s", "examples per second")


@matplotlib.rc_context(STYLE)
def _single(rows: pa.Table, split: str, name: str, ylabel: str) -> Figure | None:
    figure, axes = new_figure(HALF, 2.5, "epoch", ylabel)
    if not plot(axes, rows, split, name, color=INK):
        return None
    axes.set_ylim(bottom=0)
    return figure


@matplotlib.rc_context(STYLE)
def phase_bars(runs: Sequence[tuple[str, pa.Table]]) -> Figure | None:
    """One stacked bar of seconds per phase for every (name, rows) that has timings; None if none has."""
    run_names: list[str] = []
    run_seconds: list[dict[str, float]] = []
    for name, rows in runs:
        seconds = phase_seconds(rows)
        if sum(seconds.values()) > 0:
            run_names.append(name)
            run_seconds.append(seconds)
    if not run_seconds:
        return None
    count = len(run_seconds)
    figure, axes = new_figure(WIDE, 0.85 + 0.42 * count, "time in the loop of one worker (s)", "")
    axes.grid(axis="y", visible=False)
    phases = _phases(run_seconds)
    longest = max(sum(seconds.values()) for seconds in run_seconds)
    for row, seconds in enumerate(run_seconds):
        _phase_bar(axes, row, seconds, phases, longest)
    axes.set_yticks(range(count), [_shorten(name) for name in run_names], color=INK)
    axes.set_ylim(count - 0.45, -0.55)
    axes.set_xlim(0, 1.01 * longest)
    legend(axes, [_swatch(_phase_color(phase), phase.replace("_", " and ")) for phase in phases])
    return figure


def _phases(run_seconds: Sequence[Mapping[str, float]]) -> list[str]:
    """The phases that took time in any run in their usual order, then unknown ones by name."""
    phases = [phase for phase in PHASES if any(seconds.get(phase, 0) > 0 for seconds in run_seconds)]
    unknown = {phase for seconds in run_seconds for phase in seconds} - set(PHASES)
    return phases + sorted(unknown)


def _phase_bar(axes: Axes, row: int, seconds: Mapping[str, float], phases: Sequence[str], longest: float) -> None:
    total = sum(seconds.values())
    left = 0.0
    for phase in phases:
        width = seconds.get(phase, 0.0)
        bar = axes.barh(row, width, left=left, height=0.62, color=_phase_color(phase))
        if width > 0.05 * longest:
            axes.bar_label(bar, [f"{width / total:.0%}"], label_type="center", color="#ffffff", fontsize=8.5)
        left += width


def _phase_color(phase: str) -> str:
    return PHASE_COLORS.get(phase, SPARE[-1])


def _shorten(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "\u2026"


@matplotlib.rc_context(STYLE)
def final_bars(runs: Sequence[tuple[str, Mapping[str, float], int]]) -> Figure | None:
    """Bars of final accuracies with 95% intervals for every (name, accuracy by measure, examples); None without any.

    Bars are grouped by measure ("clean", "robust/<threat>"), so that those of different runs are side by side.
    """
    runs = [run for run in runs if any(math.isfinite(value) for value in run[1].values())]
    if not runs:
        return None
    figure, axes = new_figure(WIDE, 3.5, "", "test accuracy (%)")
    axes.grid(axis="x", visible=False)
    measures = ordered(name.removeprefix("robust/") for _, accuracy, _ in runs for name in accuracy)
    width = 0.8 / len(runs)
    for index, (_, accuracy, count) in enumerate(runs):
        for place, measure in enumerate(measures):
            value = accuracy.get(measure, accuracy.get(f"robust/{measure}", math.nan))
            if math.isfinite(value):
                x = place + (index - (len(runs) - 1) / 2) * width  # the bars of a measure are centred at its place
                _interval_bar(axes, x, value, count, width, color_of(measure, measures), _opacity(index, len(runs)))
    axes.set_xticks(range(len(measures)), [label(measure) for measure in measures], color=INK)
    axes.set_xlim(-0.55, len(measures) - 0.45)
    axes.set_ylim(0, 1.07)  # room for the numbers above bars near 100%
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    if len(runs) > 1:
        legend(axes, [_swatch(INK, _shorten(run[0]), _opacity(i, len(runs))) for i, run in enumerate(runs)])
    return figure


def _opacity(index: int, count: int) -> float:
    """Opacity of the bars of run `index` of `count`: 1 for the first run, 0.4 for the last."""
    return 1 - 0.6 * index / max(count - 1, 1)


def _interval_bar(axes: Axes, x: float, value: float, count: int, width: float, color: str, alpha: float) -> None:
    """A bar with its 95% interval over `count` examples, and its value above it where there is room."""
    axes.bar(x, value, width=0.88 * width, color=color, alpha=alpha)
    top = value
    if count > 0:
        low, top = wilson(value, count)
        # rounding may put an end of the interval a digit inside the value, which errorbar refuses
        axes.errorbar(x, value, [[max(value - low, 0)], [max(top - value, 0)]], color=MUTED, lw=1.2, capsize=2.5)
    if width > 0.13:
        axes.annotate(
            f"{100 * value:.1f}",
            (x, top),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=8.5,
        )


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element for HTML.

    `name` makes its ids differ from those of other figures of the page; `description` is read by screen readers.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # an element of HTML has no XML declaration
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # ids of groups repeat in every figure, and those of one page must differ; nothing refers to them
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    svg = svg.replace("xlink:href", "href")
    # only the box is kept of the attributes: without width and height the figure takes the width of the page
    box = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(description)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    return re.sub("|".join(VARIABLES), lambda match: css_color(match[0]), svg).strip()
