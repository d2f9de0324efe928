"""The data of figures: series of metrics, labels and colours of measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["Curve", "color_of", "curve", "label", "names", "ordered", "phase_seconds"]

LABELS = {
    "clean": "clean",
    "linf": "\u2113\u221e",
    "l2": "\u2113\u2082",
    "l1": "\u2113\u2081",
    "average": "average",
    "union": "union",
}
"""Labels of known measures, in the order in which every table and figure shows them."""

INK = "#1a1c22"
COLORS = {
    "clean": INK,
    "linf": "#0072b2",
    "l2": "#e69f00",
    "l1": "#009e73",
    "average": "#8c6bb1",
    "union": "#d55e00",
}
"""The colour of each measure, the same everywhere: Okabe and Ito's colour-blind safe palette and a purple."""
SPARE = ("#cc79a7", "#56b4e9", "#a6761d", "#666f80")

POINTS = 400
"""The largest number of points of a curve on the page. More are averaged, which limits the size of the page."""


@dataclass(frozen=True)
class Curve:
    """One metric over the steps: steps int64 (n,), epochs and values float64 (n,), in the order of the steps."""

    steps: NDArray[np.int64]
    epochs: NDArray[np.float64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def downsample(self, points: int = POINTS) -> Curve:
        """The curve with at most `points` points: the mean of each group of consecutive values, NaN ignored.

        Step and epoch are the last of each group.
        """
        if len(self) <= points:
            return self
        # the borders between groups of nearly equal size, without the two outer ends
        edges = np.linspace(0, len(self), points + 1).round().astype(int)[1:-1]
        epochs = [float(group[-1]) for group in np.split(self.epochs, edges)]
        steps = [int(group[-1]) for group in np.split(self.steps, edges)]
        values = [_finite_mean(group) for group in np.split(self.values, edges)]
        return Curve(np.array(steps), np.array(epochs), np.array(values))


def _finite_mean(values: NDArray[np.float64]) -> float:
    """The mean of the finite values; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def curve(rows: pa.Table, split: str, name: str) -> Curve:
    """The series `name` of `split`; empty when the run has no such rows."""
    series = rows.filter((pc.field("split") == split) & (pc.field("name") == name))
    return Curve(series["step"].to_numpy(), series["epoch"].to_numpy(), series["value"].to_numpy())


def names(rows: pa.Table, split: str, prefix: str) -> list[str]:
    """The names of rows of `split` that begin with `prefix`, without it, in the order of LABELS, unknown ones last."""
    row_names = pc.unique(rows.filter(pc.field("split") == split)["name"]).to_pylist()
    return ordered(name.removeprefix(prefix) for name in row_names if name.startswith(prefix))


def ordered(measures: Iterable[str]) -> list[str]:
    """Distinct measures in the order of LABELS, unknown ones last and by name."""
    known = list(LABELS)

    def position(measure: str) -> tuple[int, str]:
        return (known.index(measure) if measure in LABELS else len(known), measure)

    return sorted(set(measures), key=position)


def label(measure: str) -> str:
    """The label of a measure such as "linf", "robust/linf" or "clean"."""
    short = measure.removeprefix("robust/")
    return LABELS.get(short, short)


def color_of(measure: str, among: Sequence[str] = ()) -> str:
    """The colour of a measure. An unknown one gets a spare colour by its index among the unknown ones of `among`."""
    if measure in COLORS:
        return COLORS[measure]
    unknown = [other for other in among if other not in COLORS] or [measure]
    return SPARE[unknown.index(measure) % len(SPARE)]


def phase_seconds(rows: pa.Table) -> dict[str, float]:
    """The seconds of a run in each phase, summed over its timing rows."""
    timings = rows.filter((pc.field("split") == "timing") & pc.starts_with(pc.field("name"), "seconds/"))
    totals: dict[str, float] = {}
    for name, value in zip(timings["name"].to_pylist(), timings["value"].to_pylist(), strict=True):
        phase = name.removeprefix("seconds/")
        seconds = value if math.isfinite(value) else 0.0  # a damaged row is not a time
        totals[phase] = totals.get(phase, 0.0) + seconds
    return totals
