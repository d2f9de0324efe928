"""Intervals over questions: what would be measured with other questions of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "paired_bootstrap"]


class Estimate(NamedTuple):
    """A number and its 95% interval; NaN where it could not be had."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    statistic: Callable[[NDArray[np.int64]], Mapping[str, float]], count: int, *, reps: int = 1000, seed: int = 7
) -> dict[str, Estimate]:
    """Percentile intervals of everything that `statistic` computes from the questions with the given indices [count].

    All numbers of one resample come from the same questions, so a difference that `statistic` returns, of two measures
    or of two models on the same questions, has a paired interval. A resample that leaves a number undefined (NaN) is
    left out for that number. ValueError for no question or no resample. Source: Efron, Annals of Statistics 1979.
    """
    if count < 1 or reps < 1:
        raise ValueError(f"needs questions and resamples, not {count} and {reps}")
    generator = np.random.default_rng(seed)
    values = statistic(np.arange(count))
    resampled = [statistic(generator.integers(0, count, count)) for _ in range(reps)]
    return {name: Estimate(value, *_percentiles([r[name] for r in resampled])) for name, value in values.items()}


def _percentiles(values: list[float]) -> tuple[float, float]:
    defined = np.array(values)[~np.isnan(values)]
    if not len(defined):
        return np.nan, np.nan
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)
