"""The figures of the page, as matplotlib objects and as SVG that sits inside HTML.

Invariant: equal data gives equal SVG. Colours of ink and of measures become CSS variables with the drawn colour as
fallback, so that a figure follows the page from light to dark; text stays text.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from poise.observe.names import PHASES
from poise.report.curves import COLOURS, INK, SPARE, colour, curve, label, names, ordered, phase_seconds
from poise.stats import wilson

__all__ = [
    "accuracy_curves",
    "canvas",
    "final_bars",
    "learning_rate",
    "legend",
    "loss_curves",
    "phase_bars",
    "plot",
    "speed",
    "to_svg",
    "weight_curves",
]

WIDE, HALF = 10.2, 5.0  # inches; on the page the one is twice as wide as the other, so that their text is of one size
MUTED, GRID = "#6b7280", "#e2e5ea"
PHASE_COLOURS = dict(zip(PHASES, ("#56b4e9", "#e69f00", "#d55e00", "#0072b2", "#009e73", "#cc79a7"), strict=True))
VARIABLES = {c: f"c-{c[1:]}" for c in (*COLOURS.values(), *SPARE)}
VARIABLES |= {INK: "ink", MUTED: "muted", GRID: "grid"}

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


def canvas(width: float, height: float, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty figure of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.01)
    return figure, axes


def legend(axes: Axes, handles: Sequence[Line2D] | None = None) -> None:
    """One row above the plot, where it hides no data."""
    handles = axes.get_lines() if handles is None else handles
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderpad=0.2, borderaxespad=0.1,
        handlelength=1.5, columnspacing=1.4,
    )  # fmt: skip


def _swatch(tone: str, text: str, shade: float = 1.0) -> Line2D:
    return Line2D([], [], color=tone, alpha=shade, lw=7, solid_capstyle="butt", label=text)


def plot(axes: Axes, rows: pa.Table, split: str, name: str, **style: Any) -> bool:
    """Draw one series against epochs, if the run has it; a single point gets a marker, or nothing would be seen."""
    series = curve(rows, split, name).thinned()
    if len(series):
        axes.plot(series.epochs, series.values, marker="o" if len(series) == 1 else None, markersize=4, **style)
    return len(series) > 0


def _several(threats: list[str]) -> list[str]:
    """The threats, or none where the only one is the whole objective and would be drawn twice."""
    return threats if len(threats) > 1 else []


@matplotlib.rc_context(STYLE)
def loss_curves(rows: pa.Table) -> Figure | None:
    """Training objective, its parts per threat and the validation loss; None without any."""
    figure, axes = canvas(HALF, 2.9, "epoch", "loss (nats)")
    threats = _several(names(rows, "train", "loss/"))
    drawn = [plot(axes, rows, "train", f"loss/{t}", color=colour(t, threats), lw=1.1, label=label(t)) for t in threats]
    drawn += [
        plot(axes, rows, "train", "loss", color=INK, label="training objective"),
        plot(axes, rows, "validation", "loss", color=INK, ls=(0, (3, 2)), lw=1.3, label="validation"),
    ]
    if not any(drawn):
        return None
    legend(axes)
    return figure


@matplotlib.rc_context(STYLE)
def accuracy_curves(rows: pa.Table, best_step: int | None = None) -> Figure | None:
    """Clean, per-norm and union accuracy: colour is the measure, dashes the split, a vertical line the best checkpoint.

    None without any accuracy in the rows.
    """
    figure, axes = canvas(WIDE, 3.8, "epoch", "accuracy (%)")
    measures: dict[str, list[str]] = {}
    for split, style in (("validation", "-"), ("train", (0, (1, 1.4)))):
        found = _accuracies(rows, split)
        for measure, name in found.items():
            width = 1.9 if split == "validation" else 1.2
            plot(axes, rows, split, name, color=colour(measure, list(found)), ls=style, lw=width)
            measures.setdefault(measure, []).append(split)
    if not measures:
        return None
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=""))
    _mark_best(axes, rows, best_step)
    _accuracy_legend(axes, measures)
    return figure


def _accuracies(rows: pa.Table, split: str) -> dict[str, str]:
    """Row names by measure; without the summaries of a single threat, which they equal."""
    found = names(rows, split, "")
    accuracies = {n.removeprefix("robust/"): n for n in found if n in ("clean", "accuracy") or n.startswith("robust/")}
    if len(set(accuracies) - {"clean", "accuracy", "average", "union"}) == 1:
        return {measure: name for measure, name in accuracies.items() if measure not in ("average", "union")}
    return accuracies


def _mark_best(axes: Axes, rows: pa.Table, best_step: int | None) -> None:
    """A line at the validation that chose the best checkpoint."""
    found = rows.filter((pc.field("split") == "validation") & (pc.field("step") == (best_step or 0)))
    if not len(found):
        return
    epoch = found["epoch"][0].as_py()
    axes.axvline(epoch, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1, gid="best")
    axes.annotate(
        f"best checkpoint (step {best_step:,})", (epoch, 0.02), xycoords=("data", "axes fraction"),
        xytext=(-4, 2), textcoords="offset points", ha="right", color=MUTED, fontsize=8.5,
    )  # fmt: skip


def _accuracy_legend(axes: Axes, measures: Mapping[str, Sequence[str]]) -> None:
    shorts = ordered(measures)
    handles = [Line2D([], [], color=colour(m, shorts), lw=1.9, label=label(m)) for m in shorts]
    splits = {split for found in measures.values() for split in found}
    if "validation" in splits:
        handles.append(Line2D([], [], color=MUTED, lw=1.9, label="validation"))
    if "train" in splits:
        handles.append(Line2D([], [], color=MUTED, lw=1.2, ls=(0, (1, 1.4)), label="training batches"))
    legend(axes, handles)


@matplotlib.rc_context(STYLE)
def weight_curves(rows: pa.Table) -> Figure | None:
    """Weight of every threat in the objective over time; None where there are not several to weigh."""
    threats = _several(names(rows, "train", "weight/"))
    if not threats:
        return None
    figure, axes = canvas(HALF, 2.9, "epoch", "weight in the objective")
    for threat in threats:
        plot(axes, rows, "train", f"weight/{threat}", color=colour(threat, threats), label=label(threat))
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def learning_rate(rows: pa.Table) -> Figure | None:
    """Learning rate over time; None without it."""
    return _single(rows, "train", "lr", "learning rate")


def speed(rows: pa.Table) -> Figure | None:
    """Training examples per second over time; None without timings."""
    return _single(rows, "timing", "examples_per_s", "examples per second")


@matplotlib.rc_context(STYLE)
def _single(rows: pa.Table, split: str, name: str, ylabel: str) -> Figure | None:
    figure, axes = canvas(HALF, 2.5, "epoch", ylabel)
    if not plot(axes, rows, split, name, color=INK):
        return None
    axes.set_ylim(bottom=0)
    return figure


@matplotlib.rc_context(STYLE)
def phase_bars(runs: Sequence[tuple[str, pa.Table]]) -> Figure | None:
    """One stacked bar of seconds per phase for every (name, rows) that has timings; None if none has."""
    timed = [(name, seconds) for name, rows in runs if sum((seconds := phase_seconds(rows)).values()) > 0]
    if not timed:
        return None
    figure, axes = canvas(WIDE, 0.85 + 0.42 * len(timed), "time in the loop of one worker (s)", "")
    axes.grid(axis="y", visible=False)
    phases = [p for p in PHASES if any(s.get(p, 0) > 0 for _, s in timed)]
    phases += sorted({p for _, s in timed for p in s} - set(PHASES))
    longest = max(sum(seconds.values()) for _, seconds in timed)
    for row, (_, seconds) in enumerate(timed):
        _phase_bar(axes, row, seconds, phases, longest)
    axes.set_yticks(range(len(timed)), [_short(name) for name, _ in timed], color=INK)
    axes.set_ylim(len(timed) - 0.45, -0.55)
    axes.set_xlim(0, 1.01 * longest)
    legend(axes, [_swatch(_phase_colour(p), p.replace("_", " and ")) for p in phases])
    return figure


def _phase_bar(axes: Axes, row: int, seconds: Mapping[str, float], phases: Sequence[str], longest: float) -> None:
    total, left = sum(seconds.values()), 0.0
    for phase in phases:
        width = seconds.get(phase, 0.0)
        bar = axes.barh(row, width, left=left, height=0.62, color=_phase_colour(phase))
        if width > 0.05 * longest:
            axes.bar_label(bar, [f"{width / total:.0%}"], label_type="center", color="#ffffff", fontsize=8.5)
        left += width


def _phase_colour(phase: str) -> str:
    return PHASE_COLOURS.get(phase, SPARE[-1])


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "\u2026"


@matplotlib.rc_context(STYLE)
def final_bars(runs: Sequence[tuple[str, Mapping[str, float], int]]) -> Figure | None:
    """Bars of final accuracies with 95% intervals for every (name, accuracy by measure, examples); None without any.

    Runs are grouped by measure ("clean", "robust/<threat>"), so that a reader compares bars that stand side by side.
    """
    runs = [run for run in runs if any(math.isfinite(v) for v in run[1].values())]
    if not runs:
        return None
    figure, axes = canvas(WIDE, 3.5, "", "test accuracy (%)")
    axes.grid(axis="x", visible=False)
    measures = ordered(m.removeprefix("robust/") for _, accuracy, _ in runs for m in accuracy)
    width = 0.8 / len(runs)
    for index, (_, accuracy, count) in enumerate(runs):
        for place, measure in enumerate(measures):
            value = accuracy.get(measure, accuracy.get(f"robust/{measure}", math.nan))
            if math.isfinite(value):
                x = place + (index - (len(runs) - 1) / 2) * width
                _interval_bar(axes, x, value, count, width, colour(measure, measures), _shade(index, len(runs)))
    axes.set_xticks(range(len(measures)), [label(m) for m in measures], color=INK)
    axes.set_xlim(-0.55, len(measures) - 0.45)
    axes.set_ylim(0, 1.07)  # room for the numbers above bars near 100%
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    if len(runs) > 1:
        legend(axes, [_swatch(INK, _short(run[0]), _shade(i, len(runs))) for i, run in enumerate(runs)])
    return figure


def _shade(index: int, count: int) -> float:
    """Opacity that tells the bars of run `index` of `count` apart, full for the first."""
    return 1 - 0.6 * index / max(count - 1, 1)


def _interval_bar(axes: Axes, x: float, value: float, count: int, width: float, tone: str, shade: float) -> None:
    axes.bar(x, value, width=0.88 * width, color=tone, alpha=shade)
    top = value
    if count > 0:
        low, top = wilson(value, count)
        axes.errorbar(x, value, [[max(value - low, 0)], [max(top - value, 0)]], color=MUTED, lw=1.2, capsize=2.5)
    if width > 0.13:
        axes.annotate(
            f"{100 * value:.1f}", (x, top), xytext=(0, 3), textcoords="offset points", ha="center", color=INK,
            fontsize=8.5,
        )  # fmt: skip


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element of HTML: `name` keeps its ids apart, `description` is for who cannot see it."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    svg = svg.replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(description)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    return re.sub("|".join(VARIABLES), lambda hit: f"var(--{VARIABLES[hit[0]]}, {hit[0]})", svg).strip()
