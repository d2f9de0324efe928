"""Figures of what robust training is watched by: its gap, its step sizes, the alarm of catastrophic overfitting."""

from __future__ import annotations

import matplotlib
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from poise.report.curves import INK, colour, curve, label, names
from poise.report.figures import HALF, MUTED, STYLE, canvas, legend, plot

__all__ = ["gap_curves", "overfitting_curves", "step_sizes"]

_LOOKS = {"fgsm": ("accuracy under FGSM", "#e69f00"), "pgd": ("under PGD", "#d55e00"), "cosine": ("cosine", MUTED)}


@matplotlib.rc_context(STYLE)
def gap_curves(rows: pa.Table) -> Figure | None:
    """Training minus held-out accuracy of every measure over time; None without it."""
    measures = [m for m in names(rows, "validation", "gap/") if m != "average"]
    if not measures:
        return None
    figure, axes = canvas(HALF, 2.9, "epoch", "training minus held-out accuracy (%)")
    for measure in measures:
        plot(axes, rows, "validation", f"gap/{measure}", color=colour(measure, measures), label=label(measure))
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=""))
    legend(axes, axes.get_lines()[:-1])
    return figure


@matplotlib.rc_context(STYLE)
def overfitting_curves(rows: pa.Table) -> Figure | None:
    """What the probe of a fixed training batch found over time, alarms as vertical lines; None without it."""
    figure, axes = canvas(HALF, 2.9, "epoch", "accuracy, cosine")
    drawn = [
        plot(axes, rows, "train", f"overfitting/{name}", color=tone, label=text)
        for name, (text, tone) in _LOOKS.items()
    ]
    if not any(drawn):
        return None
    legend(axes)
    alarms = curve(rows, "train", "overfitting/alarm")
    for epoch in alarms.epochs[alarms.values > 0]:
        axes.axvline(epoch, color=INK, lw=1, ls=(0, (4, 3)), gid="alarm")
    return figure


@matplotlib.rc_context(STYLE)
def step_sizes(rows: pa.Table) -> Figure | None:
    """The sum of step sizes over time, which stability bounds grow with; None without it."""
    figure, axes = canvas(HALF, 2.5, "epoch", "sum of step sizes")
    if not plot(axes, rows, "train", "sum_lr", color=INK):
        return None
    axes.set_ylim(bottom=0)
    return figure
