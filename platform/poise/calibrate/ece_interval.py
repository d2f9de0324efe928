"""The calibration error without the upward bias of the plug-in estimate, with an interval that covers it.

The plug-in ECE D = sum_b w_b |gap_b| is at least as large as the noise of the grades, so a calibrated model shows
D > 0, and resampling the questions adds the same noise once more: percentile intervals lie above the truth. Two sources
of noise are told apart here.

1. Grades, given the shares w of the bins. For every candidate t of the true error, D is simulated with binomial counts,
   and t belongs to the interval where D is no surprise: Carpenter, Test inversion bootstrap confidence intervals,
   JRSS B 61 (1999); Hansen, The grid bootstrap and the autoregressive model, Review of Economics and Statistics 81
   (1999), also for the median-unbiased estimate. Counts are discrete, so that half of a tie counts (mid-p; Lancaster,
   JASA 1961). How t is divided among the bins is unknown: samples are simulated under several draws of the gaps from
   their empirical Bayes posterior (Efron and Morris, JASA 1973). Candidates below scale these gaps, and candidates
   above move them along the least favourable direction (Stein, Third Berkeley Symposium, 1956): sum_b w_b |gap_b| grows
   fastest for its likelihood where gap_b moves by the variance of a grade of bin b.
2. Shares, sum_b (P(b) - w_b) |gap_b|: the deviation of a mean over examples, corrected for skewness (Hall, On the
   removal of skewness by transformation, JRSS B 54, 1992).

Both distances are added as squares (MOVER; Zou and Donner, Statistics in Medicine 27, 2008). Where no bin holds both
right and wrong answers, Wilson's limit of the rate of exceptions takes the place of 1. The interval of Sun et al.
(arXiv 2408.08998) is for the L2 error and covers 97 to 100% where a model is calibrated.
"""

from __future__ import annotations

from math import hypot, nan, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from poise.calibrate.ece import Edges, bin_indices, checked_pair
from poise.stats import Estimate, wilson

__all__ = ["unbiased_ece"]

Array = NDArray[np.float64]

_STEPS = 10
"""Of a bisection over places from 0 to 2, of which 1 is the observed error: ends within 0.2% of it."""
_POSTERIOR_DRAWS = 5
"""Draws M of the gaps. Each serves an equal part of the simulated samples."""


class _Bins(NamedTuple):
    """The B bins that hold anything: share of the n examples, mean confidence, gap = accuracy - confidence; all (B,).

    `variance` (B,) is that of grades that are not only 0 and 1, and None where they are: then p (1 - p) is."""

    examples: int
    share: Array
    confidence: Array
    gap: Array
    variance: Array | None


class _Draws(NamedTuple):
    """What all candidates share: the possible counts of right answers, and which of them meet in a sample.

    M draws of the gaps have R samples each. The n + B possible counts, 0 to n_b for each bin b, form one axis K.
    """

    bin: NDArray[np.int64]
    """The bin of each count (K,)."""
    right: Array
    """The counts (K,)."""
    log_ways: Array
    """log C(n_b, count) (K,)."""
    size: Array
    """|count - n_b confidence_b| / n (K,), the part of the plug-in ECE."""
    last: NDArray[np.int64]
    """Places of the largest count of each bin (B,)."""
    offset: Array
    """Where in the strata the quantiles of a draw lie (M, 1), so that all M R quantiles differ."""
    normal: Array
    """Sorted normal quantiles (M, R)."""
    order: NDArray[np.int64]
    """The places (M, R, B) in a table (M, B, R) of sorted quantiles that make up each sample."""


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
    draws = _draw(table, int(reps), seed)
    gaps = _posterior_gaps(table, seed)
    # a bin with confidence 0 cannot be over-confident, whatever its gap
    sign = np.where((gaps > 0) | (table.confidence <= 0), 1.0, -1.0)
    least_favourable = sign * _grade_variance(table)
    plug_in = float(table.share @ np.abs(table.gap))
    calibrated = _quantile(_simulated(table, 0 * gaps, draws), 0.5)
    tail = (1 - level) / 2

    def candidate(place: float) -> Array:
        """Gaps (M, B) whose error grows with the place: 0 at 0, that of the posterior at 1, the largest towards 2."""
        if place <= 1:
            return _feasible(table, place * gaps)
        return _feasible(table, gaps + (place - 1) / (2 - place) * least_favourable)

    def solve(observed: float, chance: float, low: float, high: float) -> float:
        """The last place from `low` to `high` where a plug-in ECE below `observed` has at least this chance."""
        for _ in range(_STEPS):
            place = (low + high) / 2
            values = _simulated(table, candidate(place), draws)
            below = (np.mean(values < observed - 1e-9) + np.mean(values <= observed + 1e-9)) / 2
            low, high = (place, high) if below >= chance else (low, place)
        return low

    def error(place: float) -> float:
        return float((np.abs(candidate(place)) @ table.share).mean())

    middle = solve(plug_in, 0.5, 0.0, 2.0) if plug_in > calibrated else 0.0
    estimate = error(middle)
    if _agrees_within_bins(table):
        low, high = _limits_without_variance(table, level)
        sizes = np.abs(table.gap[None])
    else:
        low = error(solve(plug_in, 1 - tail, 0.0, middle)) if middle > 0 else 0.0
        # an error below what a calibrated model shows is luck: it must not make the interval shorter
        high = error(solve(max(plug_in, calibrated), tail, middle, 2.0))
        sizes = np.abs(gaps)
    estimate = min(max(estimate, low), high)
    down, up = _share_distances(table, sizes, NormalDist().inv_cdf(1 - tail))
    if low > 0:
        low = max(0.0, estimate - hypot(estimate - low, down))
    # the estimate may be 0 where the plug-in ECE is not: the distance from 0 would hide that of the shares
    centre = min(max(estimate, plug_in), high)
    return Estimate(estimate, low, centre + hypot(high - centre, up))


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


def _agrees_within_bins(table: _Bins) -> bool:
    """Whether every bin holds only right or only wrong answers, so that p (1 - p) is 0 at the observed rates."""
    accuracy = table.confidence + table.gap
    return table.variance is None and bool((np.minimum(accuracy, 1 - accuracy) < 1e-9).all())


def _limits_without_variance(table: _Bins, level: float) -> tuple[float, float]:
    """The smallest and the largest error that is no surprise where all grades agree within their bin.

    A population with an exception rate r, the share of grades that differ from
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


def _grade_variance(table: _Bins) -> Array:
    """The variance of one grade in each bin (B,).

    Two answers of the mean accuracy are added to each bin, since bins whose answers agree have noise too.
    """
    if table.variance is not None:
        return table.variance
    count = table.share * table.examples
    right = (table.confidence + table.gap) * count
    overall = (right.sum() + 1) / (table.examples + 2)
    accuracy = (right + 2 * overall) / (count + 2)
    return np.asarray(accuracy * (1 - accuracy))


def _posterior_gaps(table: _Bins, seed: int) -> Array:
    """Gaps (M, B) from the posterior under a normal prior: of their mean, and the variance that noise leaves over.

    Raw gaps hold noise, and scaling it would make an even gap look ragged; a single choice of the gaps would hide how
    much of D may be noise in bins with a gap near 0.
    """
    noise = _grade_variance(table) / (table.share * table.examples)
    mean = table.share @ table.gap
    prior = max(0.0, float(table.share @ ((table.gap - mean) ** 2 - noise)))
    weight = prior / (prior + noise) if prior > 0 else np.zeros_like(noise)
    quantiles = [NormalDist().inv_cdf((m + 0.5) / _POSTERIOR_DRAWS) for m in range(_POSTERIOR_DRAWS)]
    generator = np.random.default_rng(seed + 1)
    normal = generator.permuted(np.tile(quantiles, (len(noise), 1)), axis=1).T  # (M, B)
    return _feasible(table, mean + weight * (table.gap - mean) + normal * np.sqrt(weight * noise))


def _share_distances(table: _Bins, sizes: Array, z: float) -> tuple[float, float]:
    """How far below and above the noise of the shares reaches, for sizes |gap| (M, B).

    The limits of a mean with deviation s and skewness g are z s / sqrt(n) to both sides of
    mean + s g (2 z^2 + 1) / (6 n).
    """
    centred = sizes - (sizes @ table.share)[:, None]
    variance = float((centred**2 @ table.share).mean())
    if variance < 1e-12:
        return 0.0, 0.0
    third = float((centred**3 @ table.share).mean())
    shift = third / variance * (2 * z * z + 1) / (6 * table.examples)
    half = z * sqrt(variance / table.examples)
    return max(0.0, half - shift), max(0.0, half + shift)


def _feasible(table: _Bins, gap: Array) -> Array:
    """Gaps (M, B) under which every accuracy is a probability."""
    return np.asarray(np.clip(table.confidence + gap, 0, 1) - table.confidence)


def _simulated(table: _Bins, gaps: Array, draws: _Draws) -> Array:
    """The plug-in ECE (M R,) of samples with these shares of the bins, from populations with these gaps (M, B).

    The M errors differ a little where gaps are at their limits: what is compared is the distance to their mean.
    """
    errors = np.abs(gaps) @ table.share  # (M,)
    if table.variance is None:
        sizes = _binomial_sizes(table, gaps, draws)
    else:
        deviation = np.sqrt(table.share * table.variance / table.examples)  # (B,)
        sizes = np.abs((table.share * gaps)[:, :, None] + deviation[:, None] * draws.normal[:, None])  # (M, B, R)
    values = sizes.ravel()[draws.order].sum(2) - errors[:, None] + errors.mean()
    return np.asarray(values.ravel())


def _binomial_sizes(table: _Bins, gaps: Array, draws: _Draws) -> Array:
    """|count - n_b confidence_b| / n at R quantiles (M B R,) of the binomial count of right answers."""
    posterior_draws, reps, bins = draws.order.shape
    accuracy = np.clip(table.confidence + gaps, 1e-12, 1 - 1e-12)
    logit = np.log(accuracy / (1 - accuracy))
    none_right = table.share * table.examples * np.log1p(-accuracy)
    chance = logit[:, draws.bin]  # (M, K)
    chance *= draws.right
    chance += none_right[:, draws.bin]
    chance += draws.log_ways
    np.maximum(chance, -50, out=chance)  # exp is three times as slow where it underflows
    np.exp(chance, out=chance)
    # the chances of each bin add up to 1, so one running sum serves all bins: it says how many quantiles are reached
    np.cumsum(chance, axis=1, out=chance)
    chance *= reps
    chance += 1 - draws.offset
    reached = chance.astype(np.int64)
    reached[:, draws.last] = reps * np.arange(1, bins + 1)
    times = np.diff(reached, axis=1, prepend=0)  # (M, K)
    return np.repeat(np.tile(draws.size, posterior_draws), times.ravel())


def _draw(table: _Bins, reps: int, seed: int) -> _Draws:
    """Latin hypercube draws: every bin has the same R quantiles in a random order, so that tails are not luck.

    Source: McKay, Beckman and Conover, Technometrics 21 (1979).
    """
    count = np.rint(table.share * table.examples).astype(np.int64)
    bins = len(count)
    index = np.repeat(np.arange(bins), count + 1)
    last = np.cumsum(count + 1) - 1
    total = count[index].astype(np.float64)
    right = (np.arange(len(index)) - (last - count)[index]).astype(np.float64)
    log_ways = gammaln(total + 1) - gammaln(right + 1) - gammaln(total - right + 1)
    size = np.abs(right - total * table.confidence[index]) / table.examples
    each = -(-reps // _POSTERIOR_DRAWS)
    offset = (np.arange(_POSTERIOR_DRAWS)[:, None] + 0.5) / _POSTERIOR_DRAWS
    quantiles = (np.arange(each) + offset) / each  # (M, R)
    normal = np.array([[NormalDist().inv_cdf(q) for q in row] for row in quantiles.tolist()])
    places = np.arange(_POSTERIOR_DRAWS * bins * each).reshape(_POSTERIOR_DRAWS, bins, each)
    order = np.ascontiguousarray(np.random.default_rng(seed).permuted(places, axis=2).transpose(0, 2, 1))
    return _Draws(index, right, log_ways, size, last, offset, normal, order)


def _quantile(values: Array, q: float) -> float:
    """The smallest value that at least a share q of the values does not exceed."""
    place = int(np.ceil(q * len(values))) - 1
    return float(np.partition(values, place)[place])
