"""Numbers behind the page: series out of the rows, labels and colours of threats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["Curve", "colour", "curve", "label", "names", "ordered", "phase_seconds"]

LABELS = {
    "clean": "clean",
    "linf": "\u2113\u221e",
    "l2": "\u2113\u2082",
    "l1": "\u2113\u2081",
    "average": "average",
    "union": "union",
}
"""Names of known measures in the order in which every table and figure shows them."""

INK = "#1a1c22"
COLOURS = {
    "clean": INK,
    "linf": "#0072b2",
    "l2": "#e69f00",
    "l1": "#009e73",
    "average": "#8c6bb1",
    "union": "#d55e00",
}
"""Okabe and Ito's palette for colour-blind readers, with one more purple; a measure has one colour everywhere."""
SPARE = ("#cc79a7", "#56b4e9", "#a6761d", "#666f80")

POINTS = 400
"""A curve on the page has at most this many points: more are averaged, so that a long run stays a small page."""


@dataclass(frozen=True)
class Curve:
    """One series of rows: steps int64 (n,), epochs and values float64 (n,), in step order."""

    steps: NDArray[np.int64]
    epochs: NDArray[np.float64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def thinned(self, points: int = POINTS) -> Curve:
        """At most `points` points: consecutive ones are averaged (NaN ignored), the step is the last of each group."""
        if len(self) <= points:
            return self
        edges = np.linspace(0, len(self), points + 1).round().astype(int)[1:-1]
        epochs = [float(part[-1]) for part in np.split(self.epochs, edges)]
        steps = [int(part[-1]) for part in np.split(self.steps, edges)]
        values = [_mean(part) for part in np.split(self.values, edges)]
        return Curve(np.array(steps), np.array(epochs), np.array(values))


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def curve(rows: pa.Table, split: str, name: str) -> Curve:
    """The series `name` of `split`; empty when the run has no such rows."""
    part = rows.filter((pc.field("split") == split) & (pc.field("name") == name))
    return Curve(*(part[key].to_numpy() for key in ("step", "epoch", "value")))


def names(rows: pa.Table, split: str, prefix: str) -> list[str]:
    """What follows `prefix` in the row names of `split`, in the order of LABELS, unknown ones last."""
    found = pc.unique(rows.filter(pc.field("split") == split)["name"]).to_pylist()
    return ordered(name.removeprefix(prefix) for name in found if name.startswith(prefix))


def ordered(measures: Iterable[str]) -> list[str]:
    """Distinct measures in the order of LABELS, unknown ones last and by name."""
    known = list(LABELS)
    return sorted(set(measures), key=lambda m: (known.index(m) if m in LABELS else len(known), m))


def label(measure: str) -> str:
    """How a measure ("linf", "robust/linf", "clean") is written for a reader."""
    short = measure.removeprefix("robust/")
    return LABELS.get(short, short)


def colour(measure: str, among: Sequence[str] = ()) -> str:
    """The colour of a measure; one that is unknown takes a spare by its place among the unknown ones of `among`."""
    if measure in COLOURS:
        return COLOURS[measure]
    unknown = [m for m in among if m not in COLOURS] or [measure]
    return SPARE[unknown.index(measure) % len(SPARE)]


def phase_seconds(rows: pa.Table) -> dict[str, float]:
    """Seconds that a run has spent in each phase, summed over its timing rows."""
    part = rows.filter((pc.field("split") == "timing") & pc.starts_with(pc.field("name"), "seconds/"))
    totals: dict[str, float] = {}
    for name, value in zip(part["name"].to_pylist(), part["value"].to_pylist(), strict=True):
        phase = name.removeprefix("seconds/")
        totals[phase] = totals.get(phase, 0.0) + (value if math.isfinite(value) else 0.0)
    return totals
