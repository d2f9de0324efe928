"""The calibration error without the upward bias of the plug-in estimate, with an interval that covers it.

The plug-in ECE D = sum_b w_b |gap_b| is at least as large as the noise of the grades, so a calibrated model shows
D > 0, and resampling the questions adds the same noise once more: percentile intervals lie above the truth. Here the
distribution of D is simulated for every candidate t of the true error, and t belongs to the interval where D is no
surprise. Near 0 and far from it this covers with the same nominal probability.

Source: Carpenter, Test inversion bootstrap confidence intervals, JRSS B 61 (1999); Hansen, The grid bootstrap and the
autoregressive model, Review of Economics and Statistics 81 (1999), also for the median-unbiased estimate. The gaps of
the bins are shrunk towards their mean as empirical Bayes does (Efron and Morris, JASA 1973) before they are scaled to
t. Where no bin holds both right and wrong answers the simulated noise vanishes, and Wilson's limit of the rate of
exceptions widens the interval. The interval of Sun et al. (arXiv 2408.08998) is for the L2 error and covers 97 to 100%
where a model is calibrated.
"""

from __future__ import annotations

from math import nan
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poise.calibrate.ece import Edges, bin_indices, checked_pair
from poise.stats import Estimate, wilson

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


class _Noise(NamedTuple):
    """R draws, the same ones for every candidate: shares of the bins and standard normal noise of grades, (R, B)."""

    shares: Array
    grades: Array


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
    noise = _draw_noise(table.share, table.examples, int(reps), seed)
    plug_in = float(table.share @ np.abs(table.gap))
    direction = _direction(table)
    calibrated = _quantile(_simulated(table, 0 * direction, noise), 0.5)
    tail = (1 - level) / 2

    def solve(observed: float, quantile: float) -> float:
        """The largest true error at which this quantile of the plug-in ECE is at most `observed`; 0 where none is.

        The quantile grows with the error, so that a bisection finds it. Where all accuracies are at 0 or 1 and even
        then the quantile is smaller, the sample's bins hold other shares of the examples than the population's: the
        distance is added, as for a shift.
        """
        low, high = 0.0, _LARGEST
        for _ in range(_STEPS):
            scale = (low + high) / 2
            reached = _quantile(_simulated(table, scale * direction, noise), quantile) <= observed
            low, high = (scale, high) if reached else (low, scale)
        error = float(table.share @ np.abs(_feasible(table, low * direction)))
        return error + max(0.0, observed - _quantile(_simulated(table, low * direction, noise), quantile))

    # an error below what a calibrated model shows is luck: it must not make the interval shorter
    high = solve(max(plug_in, calibrated), tail)
    high = max(high, _shifted_end(table, direction, noise, max(plug_in, calibrated), tail))
    estimate = solve(plug_in, 0.5) if plug_in > calibrated else 0.0
    low = solve(plug_in, 1 - tail) if plug_in > calibrated else 0.0
    if _agrees_within_bins(table):
        exact_low, exact_high = _limits_without_variance(table, level)
        low, high = min(low, exact_low), max(high, exact_high)
    return Estimate(min(max(estimate, low), high), low, high)


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


def _shifted_end(table: _Bins, direction: Array, noise: _Noise, observed: float, tail: float) -> float:
    """The largest error where the shares of the bins differ from the sample's by as much as their noise allows.

    Near accuracies of 0 and 1 the gaps cannot grow, but the shares of the wide ones can.
    """
    ends = []
    for scale in np.linspace(0, 1, 41):
        gap = _feasible(table, scale * direction)
        error = float(table.share @ np.abs(gap))
        distance = observed - _quantile(_simulated(table, gap, noise), tail)
        allowed = error - _quantile(noise.shares @ np.abs(gap), tail)
        if distance >= 0:
            ends.append(error + min(distance, max(allowed, 0.0)))
    return max(ends, default=0.0)


def _agrees_within_bins(table: _Bins) -> bool:
    """Whether every bin holds only right or only wrong answers, so that p (1 - p) is 0 at the observed rates."""
    accuracy = table.confidence + table.gap
    return table.variance is None and bool((np.minimum(accuracy, 1 - accuracy) < 1e-9).all())


def _limits_without_variance(table: _Bins, level: float) -> tuple[float, float]:
    """The smallest and the largest error that is no surprise where all grades agree within their bin.

    The simulated noise vanishes there, yet a population with an exception rate r, the share of grades that differ from
    the others of their bin, shows no exception in n examples with the probability (1 - r)^n. So r reaches from 0 to
    Wilson's limit for 0 of n, whatever the bins. The error is smallest where all exceptions close the gaps, and largest
    where they fall into the bins that have no gap to close.
    """
    w = table.share
    size = np.abs(table.gap)  # (B,), 1 - confidence or confidence: the room up to the grade that was not seen is 1
    rate = wilson(0.0, table.examples, NormalDist().inv_cdf((1 + level) / 2))[1]
    low = max(0.0, float(w @ size) - rate)
    order = np.argsort(size)  # a bin that is filled with exceptions adds w (1 - 2 size)
    w, size = w[order], size[order]
    exceptions = np.clip(rate - (np.cumsum(w) - w), 0, w)  # (B,)
    high = float(np.maximum(w * size, np.abs(exceptions - w * size)).sum())
    return low, high


def _direction(table: _Bins) -> Array:
    """The gaps (B,) shrunk towards their mean by the share of noise in their spread, scaled to an error of 1.

    Raw gaps hold noise, and scaling it would make an even gap look ragged. Without any gap: over-confident everywhere.
    """
    w, gap = table.share, table.gap
    variance = table.variance
    if variance is None:
        count = w * table.examples
        accuracy = ((table.confidence + gap) * count + 1) / (count + 2)  # of Laplace: bins that agree have noise too
        variance = accuracy * (1 - accuracy)
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


def _simulated(table: _Bins, gap: Array, noise: _Noise) -> Array:
    """The plug-in ECE (R,) of R samples of n examples from a population with these gaps.

    Which bin an example falls into is random, with the covariance (diag(w) - w w') / n of the shares, and so are the
    grades in it.
    """
    c = table.confidence
    feasible = _feasible(table, gap)
    accuracy = c + feasible
    variance = accuracy * (1 - accuracy) if table.variance is None else table.variance
    deviation = np.sqrt(table.share * variance / table.examples)
    sums = noise.shares * feasible + noise.grades * deviation  # (R, B), of (grade - confidence) / n
    if table.variance is None:  # no accuracy is below 0 or above 1: with confidence 1, nobody is under-confident
        sums = np.clip(sums, -noise.shares * c, noise.shares * (1 - c))
    return np.asarray(np.abs(sums).sum(1))


def _draw_noise(share: Array, examples: int, reps: int, seed: int) -> _Noise:
    """Latin hypercube draws: every bin has the same R normal quantiles in a random order, so that tails are not luck.

    Source: McKay, Beckman and Conover, Technometrics 21 (1979).
    """
    generator = np.random.default_rng(seed)
    quantiles = [NormalDist().inv_cdf((r + 0.5) / reps) for r in range(reps)]
    normal = generator.permuted(np.tile(quantiles, (2 * len(share), 1)), axis=1).T  # (R, 2 B)
    grades, root = normal[:, : len(share)], normal[:, len(share) :] * np.sqrt(share)
    shares = share + (root - root.sum(1, keepdims=True) * share) / np.sqrt(examples)
    return _Noise(np.maximum(shares, 0), grades)


def _quantile(values: Array, q: float) -> float:
    """The smallest value that at least a share q of the values does not exceed."""
    place = int(np.ceil(q * len(values))) - 1
    return float(np.partition(values, place)[place])
