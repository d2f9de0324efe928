"""The calibration error without the upward bias of the plug-in estimate, with an interval that covers it.

The plug-in ECE D = sum_b w_b |gap_b| is at least as large as the noise of the grades, so a calibrated model shows
D > 0, and resampling the questions adds the same noise once more: percentile intervals lie above the truth. Here the
distribution of D is simulated for every candidate t of the true error, and t belongs to the interval where D is no
surprise. Near 0 and far from it this covers with the same nominal probability.

Source: Carpenter, Test inversion bootstrap confidence intervals, JRSS B 61 (1999); Hansen, The grid bootstrap and the
autoregressive model, Review of Economics and Statistics 81 (1999), also for the median-unbiased estimate. The gaps of
the bins are shrunk towards their mean as empirical Bayes does (Efron and Morris, JASA 1973) before they are scaled to
t. The interval of Sun et al. (arXiv 2408.08998) is for the L2 error and covers 97 to 100% where a model is calibrated.
"""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poise.calibrate.ece import Edges, bin_indices, checked_pair
from poise.stats import Estimate

__all__ = ["unbiased_ece"]

Array = NDArray[np.float64]

_LARGEST = 4.0
"""Scale of the gaps at which the search for an end begins: all accuracies are at 0 or 1 long before."""
_STEPS = 15


class _Bins(NamedTuple):
    """The B bins that hold anything: share of the n examples, mean confidence, gap = accuracy - confidence; all (B,).

    `variance` (B,) is that of grades that are not only 0 and 1, and None where they are: then p (1 - p) is."""

    examples: int
    share: Array
    confidence: Array
    gap: Array
    variance: Array | None


def unbiased_ece(
    conf: ArrayLike,
    correct: ArrayLike,
    bins: int = 10,
    edges: Edges = "integer",
    *,
    level: float = 0.95,
    reps: int = 1000,
    seed: int = 7,
) -> Estimate:
    """The median-unbiased estimate of the ECE (L1) of the population, and the ends of its interval.

    What is estimated is the error over these bins, sum_b P(b) |E[correct - conf | b]|; a smaller error within the bins
    is invisible to any binned measure. The estimate is 0 where the plug-in ECE is what a calibrated model would show,
    and it always lies in the interval. NaN for N = 0.

    Args:
        conf: confidences [N] in [0, 1].
        correct: grades [N] in [0, 1].
        bins, edges: as in `ece`.
        level: the nominal coverage, in (0, 1).
        reps: draws of the simulated distribution; the same ones for every candidate.
        seed: of these draws.
    """
    if not 0 < level < 1 or reps < 1 or reps != int(reps):
        raise ValueError(f"needs a level between 0 and 1 and at least one draw, not {level} and {reps}")
    c, y = checked_pair(conf, correct)
    if not len(c):
        return Estimate(nan, nan, nan)
    table = _table(c, y, bins, edges)
    noise = np.random.default_rng(seed).standard_normal((int(reps), len(table.share)))
    plug_in = float(table.share @ np.abs(table.gap))
    direction = _direction(table)
    calibrated = _quantile(_simulated(table, 0 * direction, noise), 0.5)
    tail = (1 - level) / 2

    def solve(observed: float, quantile: float) -> float:
        """The largest true error at which this quantile of the plug-in ECE is at most `observed`; 0 where none is.

        The quantile grows with the error, so that a bisection finds it.
        """
        low, high = 0.0, _LARGEST
        for _ in range(_STEPS):
            scale = (low + high) / 2
            reached = _quantile(_simulated(table, scale * direction, noise), quantile) <= observed
            low, high = (scale, high) if reached else (low, scale)
        return float(table.share @ np.abs(_feasible(table, low * direction)))

    # an error below what a calibrated model shows is luck: it must not make the interval shorter
    high = solve(max(plug_in, calibrated), tail)
    estimate = solve(plug_in, 0.5) if plug_in > calibrated else 0.0
    low = solve(plug_in, 1 - tail) if plug_in > calibrated else 0.0
    return Estimate(estimate, low, high)


def _table(c: Array, y: Array, bins: int, edges: Edges) -> _Bins:
    index = bin_indices(c, bins, edges)[1]
    count = np.bincount(index)
    full = count > 0
    confidence = np.bincount(index, c)[full] / count[full]
    accuracy = np.bincount(index, y)[full] / count[full]
    variance = None
    if not np.isin(y, (0, 1)).all():
        residual = y - c
        mean = (np.bincount(index, residual)[full] / count[full])[np.cumsum(full)[index] - 1]
        variance = np.bincount(index, (residual - mean) ** 2)[full] / np.maximum(count[full] - 1, 1)
    return _Bins(len(c), count[full] / len(c), confidence, accuracy - confidence, variance)


def _direction(table: _Bins) -> Array:
    """The gaps (B,) shrunk towards their mean by the share of noise in their spread, scaled to an error of 1.

    Raw gaps hold noise, and scaling it would make an even gap look ragged. Without any gap: over-confident everywhere.
    """
    w, gap = table.share, table.gap
    variance = table.variance
    if variance is None:
        accuracy = table.confidence + gap
        variance = np.maximum(accuracy * (1 - accuracy), table.confidence * (1 - table.confidence))
    mean = w @ gap
    spread = float(w @ (gap - mean) ** 2)
    noise = float(variance.sum() / table.examples)  # sum_b w_b variance_b / (n w_b)
    kept = max(0.0, 1 - noise / spread) if spread > 0 else 0.0
    shrunk = mean + kept * (gap - mean)
    size = float(w @ np.abs(shrunk))
    return shrunk / size if size > 1e-12 else -np.ones_like(gap)


def _feasible(table: _Bins, gap: Array) -> Array:
    """Gaps (B,) under which every accuracy is a probability."""
    accuracy = np.clip(table.confidence + gap, 0, 1)
    return np.asarray(accuracy - table.confidence)


def _simulated(table: _Bins, gap: Array, noise: Array) -> Array:
    """The plug-in ECE (R,) of R samples of n examples from a population with these gaps; `noise` (R, B) is normal.

    The bin sums of (grade - confidence) / n have mean m = w gap and covariance (diag(a) - m m') / n, with
    a = w (variance + gap^2): which bin an example falls into is random too.
    """
    w, c = table.share, table.confidence
    feasible = _feasible(table, gap)
    accuracy = c + feasible
    variance = accuracy * (1 - accuracy) if table.variance is None else table.variance
    mean = w * feasible
    deviation = np.sqrt(w * (variance + feasible**2))
    # (diag(d) - k m h') z with h = m / d has the covariance diag(d^2) - m m' for this k
    h = np.divide(mean, deviation, out=np.zeros_like(mean), where=deviation > 0)
    length = min(float(h @ h), 1.0)
    k = (1 - np.sqrt(1 - length)) / length if length > 1e-12 else 0.5
    sums = mean + (noise * deviation - k * np.outer(noise @ h, mean)) / np.sqrt(table.examples)
    if table.variance is None:  # no accuracy is below 0 or above 1: with confidence 1, nobody is under-confident
        sums = np.clip(sums, -w * c, w * (1 - c))
    return np.asarray(np.abs(sums).sum(1))


def _quantile(values: Array, q: float) -> float:
    """The smallest value that at least a share q of the values does not exceed."""
    place = int(np.ceil(q * len(values))) - 1
    return float(np.partition(values, place)[place])
