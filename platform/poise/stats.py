"""Intervals of measured numbers: of rates (Wilson) and of anything that is computed from questions (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "paired_bootstrap", "wilson"]


class Estimate(NamedTuple):
    """A number and its 95% interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def wilson(share: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share in [0, 1] observed on `count` >= 1 examples; 95% by default.

    It has width where all examples agree: 8 right of 8 give 0.676 to 1, where a bootstrap gives 1 to 1. For a mean of
    values between 0 and 1 that are not only 0 or 1 it is conservative: such values vary less. ValueError for a share
    outside [0, 1] or a count that is no positive integer.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if count < 1 or count != int(count) or not 0 <= share <= 1:
        raise ValueError(f"an interval needs a share in [0, 1] and at least one example, not {share} of {count}")
    shrink = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / shrink
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / shrink
    # at the ends the two terms are equal up to rounding
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return low, high


def paired_bootstrap(
    statistic: Callable[[NDArray[np.int64]], Mapping[str, float]], count: int, *, reps: int = 1000, seed: int = 7
) -> dict[str, Estimate]:
    """Percentile intervals of everything that `statistic` computes from the questions with the given indices [count].

    All numbers of one resample come from the same questions, so a difference that `statistic` returns, of two measures
    or of two models on the same questions, has a paired interval. A resample that leaves a number undefined (NaN) is
    left out for that number. A number that is the same in all resamples has no interval (NaN): resampling equal
    questions shows nothing of the others. For means and other smooth functions of means only: an error that is a sum of
    magnitudes, such as ECE, is biased upwards in the sample and once more in each resample. ValueError for no question
    or no resample. Source: Efron, Annals of Statistics 1979.
    """
    if count < 1 or reps < 1 or count != int(count) or reps != int(reps):
        raise ValueError(f"needs questions and resamples, not {count} and {reps}")
    generator = np.random.default_rng(seed)
    values = statistic(np.arange(count))
    resampled = [statistic(generator.integers(0, count, count)) for _ in range(reps)]
    return {name: Estimate(value, *_percentiles([r[name] for r in resampled])) for name, value in values.items()}


def _percentiles(values: list[float]) -> tuple[float, float]:
    defined = np.array(values)[~np.isnan(values)]
    if not len(defined) or np.ptp(defined) <= 1e-12 * max(1.0, float(np.abs(defined).max())):
        return math.nan, math.nan
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)
