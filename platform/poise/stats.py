"""Intervals for measured numbers: for rates (Wilson), and for any statistic of a set of questions (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "paired_bootstrap", "wilson"]


class Estimate(NamedTuple):
    """A number and the ends of its 95% interval; NaN where they are not defined."""

    value: float
    low: float
    high: float


def wilson(share: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share in [0, 1] observed on `count` >= 1 examples; 95% by default.

    The interval has a width above 0 even where all examples agree: 8 right of 8 give 0.676 to 1, where a bootstrap
    gives 1 to 1. For the mean of values in [0, 1] that are not only 0 or 1 it is conservative, since such values vary
    less. ValueError for a share outside [0, 1], or a count that is not a positive integer.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if count < 1 or count != int(count) or not 0 <= share <= 1:
        raise ValueError(f"an interval needs a share in [0, 1] and at least one example, not {share} of {count}")
    shrink = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / shrink
    variance = share * (1 - share) / count + z * z / (4 * count * count)
    half = z * math.sqrt(variance) / shrink
    # a share of 0 has the lower end 0 and a share of 1 the upper end 1, exactly; the formula has rounding errors there
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return low, high


def paired_bootstrap(
    statistic: Callable[[NDArray[np.int64]], Mapping[str, float]], count: int, *, reps: int = 1000, seed: int = 7
) -> dict[str, Estimate]:
    """Percentile intervals for all numbers that `statistic` returns for the questions with the given indices [count].

    All numbers of one resample come from the same questions. So a difference that `statistic` returns, of two measures
    or of two models on the same questions, has a paired interval. A resample in which a number is undefined (NaN) is
    left out for that number. A number that is the same in all resamples has no interval (NaN): such resamples carry no
    information about other questions. Use it for means and other smooth functions of means only: an error that is a sum
    of magnitudes, such as ECE, is biased upwards in the sample, and again in each resample. ValueError for no question
    or no resample. Source: Efron, Annals of Statistics 1979.
    """
    if count < 1 or reps < 1 or count != int(count) or reps != int(reps):
        raise ValueError(f"needs questions and resamples, not {count} and {reps}")
    generator = np.random.default_rng(seed)
    values = statistic(np.arange(count))
    resampled = [statistic(generator.integers(0, count, count)) for _ in range(reps)]
    estimates = {}
    for name, value in values.items():
        low, high = _percentiles([resample[name] for resample in resampled])
        estimates[name] = Estimate(value, low, high)
    return estimates


def _percentiles(values: list[float]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the values that are not NaN; NaN where they are all equal."""
    defined = np.array(values)[~np.isnan(values)]
    if not len(defined):
        return math.nan, math.nan
    rounding = 1e-12 * max(1.0, float(np.abs(defined).max()))
    if np.ptp(defined) <= rounding:
        return math.nan, math.nan
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)
