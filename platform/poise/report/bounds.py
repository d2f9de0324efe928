"""How reports of bounds are shown: logarithms of bounds and their factors, measured gaps, and norms layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from poise.report.blocks import Cell, Column, Drawn, Grid, Line, Section, draw, number, percent
from poise.report.curves import COLOURS, SPARE
from poise.report.figures import STYLE, WIDE, canvas, legend
from poise.report.record import RunRecord

__all__ = ["SECTION"]

_COLUMNS = (
    "gap clean", "gap robust", "radius", "margin", "below", "\u220fs", "\u220fF", "\u221a\u03a6", "cover R", "ARC",
    "PAC-Bayes", "cover", "vacuous by",
)  # fmt: skip
_BRIEF = ("gap clean", "gap robust", "ARC", "PAC-Bayes", "cover")


def _grids(records: Sequence[RunRecord]) -> Iterator[Grid]:
    yield Grid(
        title="Bounds on the gap under attack: log10, measured gaps in points",
        caption="Gaps: training minus test accuracy in percentage points, the same attacks on both; robust is their "
        "union. radius: 2-norm of the farthest input that the adversary reaches; margin: percentile of the clean "
        "margins of the training images, by default of the correctly classified; below: percentage of all training "
        "images whose margin is smaller than the one used, to which the bounds on the gap are added. "
        "All else log10: products of spectral and Frobenius norms of the layers as operators, biases "
        "left out; \u03a6 and R, the complexities of the PAC-Bayes and the covering bound; bounds on the robust gap. "
        "\u201ccover\u201d has no constants and is no bound. A bound says something only below 10^0.",
        heading="network",
        columns=[Column(label, brief=label in _BRIEF) for label in _COLUMNS],
        lines=[_line(record, network) for record in records for network in _networks(record)],
    )


def _networks(record: RunRecord) -> Sequence[Mapping[str, Any]]:
    return record.summary.get("networks") or ()


def _line(record: RunRecord, network: Mapping[str, Any]) -> Line:
    gap, log10, bounds = network["gap"], network["log10"], network["bounds"].get("robust", {})
    values = [log10["spectral_product"], log10["frobenius_product"], log10["pac_bayes_complexity"] / 2]
    values += [log10["covering_complexity"], bounds.get("arc"), bounds.get("pac_bayes"), bounds.get("covering")]
    cells = [
        percent(gap["clean"]),
        percent(gap["robust/union"]),
        number(network["radius"]["robust"], form=".2f"),
        number((network["margin"] or {}).get("percentile"), form=".2g"),
        percent((network["margin"] or {}).get("below", math.nan)),
        *(number(value, form=".1f") for value in values),
        _vacuity(bounds.get("vacuous")),
    ]
    weights = network["selected"] if network["step"] is None else f"{network['selected']}, step {network['step']:,}"
    return Line(network["run"], "; ".join([f"{weights}, in {record.name}", *network["left_out"]]), cells)


def _vacuity(value: float | None) -> Cell:
    if value is None:
        return Cell("undefined")
    return Cell(f"10^{value:.1f}") if value >= 0 else Cell("not vacuous", f"10^{value:.1f}")


def _nothing(records: Sequence[RunRecord]) -> Iterator[Drawn | None]:
    return iter(())


def _details(anchor: str, record: RunRecord) -> Iterator[Drawn | None]:
    yield draw(f"{anchor}-norms", "Spectral norms", _norms(_networks(record)),
               "Each affine layer in the order of evaluation: certified upper bound (line) and Lanczos estimate from "
               "below (dots). Normalisations are folded in.")  # fmt: skip


@matplotlib.rc_context(STYLE)
def _norms(networks: Sequence[Mapping[str, Any]]) -> Figure | None:
    if not networks:
        return None
    figure, axes = canvas(WIDE, 3.2, "layer", "spectral norm")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tones = (*COLOURS.values(), *SPARE)
    lines = []
    for index, network in enumerate(networks):
        tone, layers = tones[index % len(tones)], network["layers"]
        places = range(1, len(layers) + 1)
        lines += axes.plot(places, [layer["sigma_hi"] for layer in layers], color=tone, lw=1.3, label=network["run"])
        axes.plot(places, [layer["sigma_lo"] for layer in layers], "o", color=tone, markersize=3.5)
    legend(axes, lines[:6])
    return figure


SECTION = Section("Generalisation bounds", _grids, _nothing, _details)
