"""Figures of the monitors of robust training: robust gap, step sizes, alarm of catastrophic overfitting."""

from __future__ import annotations

import matplotlib
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from poise.report.curves import INK, color_of, curve, label, names
from poise.report.figures import HALF, MUTED, STYLE, legend, new_figure, plot

__all__ = ["gap_curves", "overfitting_curves", "step_sizes"]

_PROBE_LINES = {
    "fgsm": ("accuracy under FGSM", "#e69f00"),
    "pgd": ("under PGD", "#d55e00"),
    "cosine": ("cosine", MUTED),
}
"""Label and colour of each measure of the probe."""


@matplotlib.rc_context(STYLE)
def gap_curves(rows: pa.Table) -> Figure | None:
    """Training minus held-out accuracy of every measure over epochs; None without it."""
    measures = [measure for measure in names(rows, "validation", "gap/") if measure != "average"]
    if not measures:
        return None
    figure, axes = new_figure(HALF, 2.9, "epoch", "training minus held-out accuracy (%)")
    for measure in measures:
        plot(axes, rows, "validation", f"gap/{measure}", color=color_of(measure, measures), label=label(measure))
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=""))
    legend(axes, axes.get_lines()[:-1])
    return figure


@matplotlib.rc_context(STYLE)
def overfitting_curves(rows: pa.Table) -> Figure | None:
    """The measures of the probe of a fixed training batch over epochs, alarms as vertical lines; None without it."""
    figure, axes = new_figure(HALF, 2.9, "epoch", "accuracy, cosine")
    for name, (text, line_color) in _PROBE_LINES.items():
        plot(axes, rows, "train", f"overfitting/{name}", color=line_color, label=text)
    if not axes.lines:
        return None
    legend(axes)
    alarms = curve(rows, "train", "overfitting/alarm")
    for epoch in alarms.epochs[alarms.values > 0]:
        axes.axvline(epoch, color=INK, lw=1, ls=(0, (4, 3)), gid="alarm")
    return figure


@matplotlib.rc_context(STYLE)
def step_sizes(rows: pa.Table) -> Figure | None:
    """The sum of step sizes over epochs, with which stability bounds grow; None without it."""
    figure, axes = new_figure(HALF, 2.5, "epoch", "sum of step sizes")
    if not plot(axes, rows, "train", "sum_lr", color=INK):
        return None
    axes.set_ylim(bottom=0)
    return figure
