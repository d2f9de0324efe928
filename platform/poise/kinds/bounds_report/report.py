"""Tables and figures of bounds: logarithms of bounds and their factors, measured gaps, norms of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from poise.kinds.bounds_report.result import BoundsReportResult, NetworkResult
from poise.report.blocks import Cell, Column, RenderedFigure, Row, Section, Table, draw, number, percent
from poise.report.curves import COLORS, SPARE
from poise.report.figures import STYLE, WIDE, legend, new_figure
from poise.report.record import RunRecord, with_result

__all__ = ["SECTION"]

_GAPS = ("gap clean", "gap robust")
_FACTORS = ("radius", "margin", "below", "\u220fs", "\u220fF", "\u221a\u03a6", "cover R")


def _tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    labels: dict[str, str] = {}  # of the bounds, by name
    for _, result in with_result(records, BoundsReportResult):
        labels |= result.bounds
    columns = [
        *(Column(label) for label in _GAPS),
        *(Column(label, in_terminal=False) for label in _FACTORS),
        *(Column(label) for label in labels.values()),
        Column("vacuous by", in_terminal=False),
    ]
    yield Table(
        title="Bounds on the gap under attack: log10, measured gaps in points",
        caption="Gaps: training minus test accuracy in percentage points, the same attacks on both; robust is their "
        "union. radius: 2-norm of the farthest input that the adversary reaches; margin: percentile of the clean "
        "margins of the training images, by default of the correctly classified; below: percentage of all training "
        "images whose margin is smaller than the one used, to which the bounds on the gap are added. "
        "All else log10: products of spectral and Frobenius norms of the layers as operators, biases "
        "left out; \u03a6 and R, the complexities of the PAC-Bayes and the covering bound; bounds on the robust gap. "
        "\u201ccover\u201d has no constants and is no bound. A bound says something only below 10^0.",
        heading="network",
        columns=columns,
        rows=[_row(record, network, list(labels)) for record in records for network in _networks(record)],
    )


def _networks(record: RunRecord) -> list[NetworkResult]:
    return record.result.networks if isinstance(record.result, BoundsReportResult) else []


def _row(record: RunRecord, network: NetworkResult, names: Sequence[str]) -> Row:
    """The row of a network; `names` are the bounds that the table shows."""
    log10 = network.log10
    margin = network.margin
    bounds = network.bounds.get("robust", {})
    values: list[float | None] = [
        log10["spectral_product"],
        log10["frobenius_product"],
        log10["pac_bayes_complexity"] / 2,
        log10["covering_complexity"],
        *(bounds.get(name) for name in names),
    ]
    cells = [
        percent(network.gap["clean"]),
        percent(network.gap["robust/union"]),
        number(network.radius["robust"], form=".2f"),
        number(margin.percentile if margin else None, form=".2g"),
        percent(margin.below if margin else math.nan),
        *(number(value, form=".1f") for value in values),
        _vacuous_by(bounds.get("vacuous")),
    ]
    weights = network.selected if network.step is None else f"{network.selected}, step {network.step:,}"
    return Row(network.run, "; ".join([f"{weights}, in {record.name}", *network.left_out]), cells)


def _vacuous_by(value: float | None) -> Cell:
    """By which factor the smallest bound exceeds 1, from its log10."""
    if value is None:
        return Cell("undefined")
    return Cell(f"10^{value:.1f}") if value >= 0 else Cell("not vacuous", f"10^{value:.1f}")


def _details(anchor: str, record: RunRecord) -> Iterator[RenderedFigure | None]:
    caption = (
        "Each affine layer in the order of evaluation: certified upper bound (line) and Lanczos estimate from below "
        "(dots). Normalisations are folded in. A layer of zeros is not drawn."
    )
    yield draw(f"{anchor}-norms", "Spectral norms", _norms(_networks(record)), caption)


@matplotlib.rc_context(STYLE)
def _norms(networks: Sequence[NetworkResult]) -> Figure | None:
    norms = [_positive(layer.sigma_hi) for network in networks for layer in network.layers]
    if all(math.isnan(norm) for norm in norms):
        return None
    figure, axes = new_figure(WIDE, 3.2, "layer", "spectral norm")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    palette = (*COLORS.values(), *SPARE)
    lines = []
    for index, network in enumerate(networks):
        color = palette[index % len(palette)]
        layers = network.layers
        positions = range(1, len(layers) + 1)
        upper = [_positive(layer.sigma_hi) for layer in layers]
        lower = [_positive(layer.sigma_lo) for layer in layers]
        lines += axes.plot(positions, upper, color=color, lw=1.3, label=network.run)
        axes.plot(positions, lower, "o", color=color, markersize=3.5)
    legend(axes, lines[:6])
    return figure


def _positive(norm: float) -> float:
    """A norm that a logarithmic axis can show; NaN, which is not drawn, for that of a layer of zeros."""
    return norm if norm > 0 else math.nan


SECTION = Section("Generalisation bounds", BoundsReportResult, tables=_tables, details=_details)
