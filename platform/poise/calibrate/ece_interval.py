"""The calibration error without the upward bias of the plug-in estimate, with an interval that covers it.

The plug-in ECE D = sum_b w_b |gap_b| is at least as large as the noise of the grades, so a calibrated model shows
D > 0. Resampling the questions adds the same noise again: percentile intervals lie above the truth. Two sources of
noise are treated separately here.

1. Grades, given the shares w of the bins. For every candidate t of the true error, D is simulated with binomial counts,
   and t belongs to the interval if D is not in a tail of its simulated distribution: Carpenter, Test inversion
   bootstrap confidence intervals, JRSS B 61 (1999); Hansen, The grid bootstrap and the autoregressive model, Review of
   Economics and Statistics 81 (1999), also for the median-unbiased estimate. Counts are discrete, so half of a tie
   counts (mid-p; Lancaster, JASA 1961). How t is divided among the bins is unknown: samples are simulated under several
   draws of the gaps from their empirical Bayes posterior (Efron and Morris, JASA 1973). Candidates below the observed
   error scale these gaps. Candidates above it move them along the least favourable direction (Stein, Third Berkeley
   Symposium, 1956): sum_b w_b |gap_b| grows fastest for its likelihood where gap_b moves by the variance of a grade of
   bin b.
2. Shares, sum_b (P(b) - w_b) |gap_b|: the deviation of a mean over examples, corrected for skewness (Hall, On the
   removal of skewness by transformation, JRSS B 54, 1992).

The squares of both distances are added (MOVER; Zou and Donner, Statistics in Medicine 27, 2008). Where no bin holds
both right and wrong answers, Wilson's limit of the rate of exceptions takes the place of 1. The interval of Sun et al.
(arXiv 2408.08998) is for the L2 error and covers 97 to 100% where a model is calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass
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
"""Steps of a bisection over places from 0 to 2, where 1 is the observed error: accurate to 0.2% of it."""
_POSTERIOR_DRAWS = 5
"""The number M of draws of the gaps. Each is used for an equal part of the simulated samples."""


class _Bins(NamedTuple):
    """The B bins that are not empty: share of the n examples, mean confidence, gap = accuracy - confidence; all (B,).

    `variance` (B,) is the variance of the grades if they are not only 0 and 1; None if they are, since it is then
    p (1 - p).
    """

    examples: int
    share: Array
    confidence: Array
    gap: Array
    variance: Array | None


class _Draws(NamedTuple):
    """The draws that all candidates share: the possible counts of right answers, and how samples combine them.

    M draws of the gaps have R samples each. The n + B possible counts, 0 to n_b for each bin b, form one axis K.
    """

    bin: NDArray[np.int64]
    """The bin of each count (K,)."""
    right: Array
    """The counts (K,)."""
    log_ways: Array
    """log C(n_b, count) (K,)."""
    size: Array
    """|count - n_b confidence_b| / n (K,), the term of the bin in the plug-in ECE."""
    last: NDArray[np.int64]
    """Index in K of the largest count of each bin (B,)."""
    offset: Array
    """Position of the quantiles of a draw within the strata (M, 1), so that all M R quantiles differ."""
    normal: Array
    """Sorted normal quantiles (M, R)."""
    order: NDArray[np.int64]
    """For each sample, the indices (M, R, B) of its quantiles in a flat table (M, B, R) of sorted quantiles."""


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

    The estimated quantity is the error over these bins, sum_b P(b) |E[correct - conf | b]|; no binned measure can show
    errors that cancel within a bin. The estimate is 0 where the plug-in ECE is not larger than that of a calibrated
    model, and it always lies in the interval. NaN for N = 0.

    Args:
        conf: confidences [N] in [0, 1].
        correct: grades [N] in [0, 1].
        bins, edges: as in `ece`.
        level: the nominal coverage, in (0, 1).
        reps: draws of the simulated distribution; the same draws for every candidate.
        seed: of these draws.
    """
    if not 0 < level < 1 or reps < 1 or reps != int(reps):
        raise ValueError(f"needs a level between 0 and 1 and at least one draw, not {level} and {reps}")
    c, y = checked_pair(conf, correct)
    if not len(c):
        return Estimate(nan, nan, nan)
    table = _table(c, y, bins, edges)
    draws = _draw(table, int(reps), seed)
    gaps = _posterior_gaps(table, seed)  # (M, B)
    candidates = _Candidates(table, draws, gaps)
    plug_in = float(table.share @ np.abs(table.gap))
    calibrated = _quantile(_simulated(table, 0 * gaps, draws), 0.5)
    tail = (1 - level) / 2

    # the median-unbiased estimate: half of the simulated values lie below the observed one
    middle = candidates.solve(plug_in, 0.5, 0.0, 2.0) if plug_in > calibrated else 0.0
    estimate = candidates.error(middle)
    if _agrees_within_bins(table):
        low, high = _limits_without_variance(table, level)
        sizes = np.abs(table.gap[None])
    else:
        low = candidates.error(candidates.solve(plug_in, 1 - tail, 0.0, middle)) if middle > 0 else 0.0
        # a plug-in ECE below that of a calibrated model is chance: it must not make the interval shorter
        high = candidates.error(candidates.solve(max(plug_in, calibrated), tail, middle, 2.0))
        sizes = np.abs(gaps)
    estimate = min(max(estimate, low), high)
    down, up = _share_distances(table, sizes, NormalDist().inv_cdf(1 - tail))
    if low > 0:
        low = max(0.0, estimate - hypot(estimate - low, down))
    # the estimate may be 0 where the plug-in ECE is not: a distance from 0 would outweigh that of the shares
    centre = min(max(estimate, plug_in), high)
    return Estimate(estimate, low, centre + hypot(high - centre, up))


@dataclass(frozen=True)
class _Candidates:
    """Populations of which the observed bins may be a sample, one per place from 0 to 2.

    Their error grows with the place: 0 at place 0, that of the posterior gaps (M, B) at 1, the largest towards 2.
    """

    table: _Bins
    draws: _Draws
    posterior: Array

    def gaps(self, place: float) -> Array:
        """The gaps (M, B) of the candidate."""
        if place <= 1:
            return _feasible(self.table, place * self.posterior)
        # a bin with confidence 0 cannot be over-confident, whatever its gap
        sign = np.where((self.posterior > 0) | (self.table.confidence <= 0), 1.0, -1.0)
        least_favourable = sign * _grade_variance(self.table)
        return _feasible(self.table, self.posterior + (place - 1) / (2 - place) * least_favourable)

    def error(self, place: float) -> float:
        """The error of the candidate, averaged over the M draws."""
        return float((np.abs(self.gaps(place)) @ self.table.share).mean())

    def solve(self, observed: float, chance: float, low: float, high: float) -> float:
        """The last place from `low` to `high` where a plug-in ECE below `observed` has at least this chance."""
        for _ in range(_STEPS):
            place = (low + high) / 2
            values = _simulated(self.table, self.gaps(place), self.draws)
            strictly_below = np.mean(values < observed - 1e-9)
            at_most = np.mean(values <= observed + 1e-9)
            mid_p = (strictly_below + at_most) / 2
            if mid_p >= chance:
                low = place
            else:
                high = place
        return low


def _table(c: Array, y: Array, bins: int, edges: Edges) -> _Bins:
    """The bins of confidences c [N] and grades y [N]."""
    index = bin_indices(c, bins, edges)[1]
    count = np.bincount(index)
    full = count > 0
    confidence = np.bincount(index, c)[full] / count[full]
    accuracy = np.bincount(index, y)[full] / count[full]
    variance = None
    if not np.isin(y, (0, 1)).all():
        residual = y - c
        bin_means = np.bincount(index, residual)[full] / count[full]  # (B,)
        bin_of_example = np.cumsum(full)[index] - 1  # (N,), among the bins that are not empty
        squares = (residual - bin_means[bin_of_example]) ** 2
        variance = np.bincount(index, squares)[full] / np.maximum(count[full] - 1, 1)
    return _Bins(len(c), count[full] / len(c), confidence, accuracy - confidence, variance)


def _agrees_within_bins(table: _Bins) -> bool:
    """Whether every bin holds only right or only wrong answers, so that p (1 - p) is 0 at the observed rates."""
    accuracy = table.confidence + table.gap
    return table.variance is None and bool((np.minimum(accuracy, 1 - accuracy) < 1e-9).all())


def _limits_without_variance(table: _Bins, level: float) -> tuple[float, float]:
    """The limits of the error where all grades agree within their bin.

    Let r be the exception rate of the population, the share of grades that differ from the others of their bin. Then n
    examples show no exception with probability (1 - r)^n. So r ranges from 0 to Wilson's limit for 0 of n, whatever the
    bins. The error is smallest if all exceptions close gaps, and largest if they fall into bins that have no gap to
    close.
    """
    w = table.share
    size = np.abs(table.gap)  # (B,): confidence where all answers are wrong, 1 - confidence where all are right
    _, rate = wilson(0.0, table.examples, NormalDist().inv_cdf((1 + level) / 2))
    low = max(0.0, float(w @ size) - rate)
    # a bin that is filled with exceptions adds w (1 - 2 size): fill the bins of small gaps first
    order = np.argsort(size)
    w = w[order]
    size = size[order]
    filled_before = np.cumsum(w) - w
    exceptions = np.clip(rate - filled_before, 0, w)  # (B,), as shares of all examples
    high = float(np.maximum(w * size, np.abs(exceptions - w * size)).sum())
    return low, high


def _grade_variance(table: _Bins) -> Array:
    """The variance of one grade in each bin (B,).

    Two answers of the overall accuracy are added to each bin, since a bin whose answers all agree has noise too.
    """
    if table.variance is not None:
        return table.variance
    count = table.share * table.examples
    right = (table.confidence + table.gap) * count
    overall = (right.sum() + 1) / (table.examples + 2)
    accuracy = (right + 2 * overall) / (count + 2)
    return np.asarray(accuracy * (1 - accuracy))


def _posterior_gaps(table: _Bins, seed: int) -> Array:
    """Gaps (M, B) drawn from their posterior under a normal prior.

    The prior has the mean of the gaps, and their variance minus that of the noise. The observed gaps contain noise,
    and scaling them would scale the noise too, so that equal gaps would look unequal. A single choice of the gaps would
    hide how much of D may be noise in bins with a gap near 0.
    """
    noise = _grade_variance(table) / (table.share * table.examples)
    mean = table.share @ table.gap
    prior = max(0.0, float(table.share @ ((table.gap - mean) ** 2 - noise)))  # the variance of the prior
    weight = prior / (prior + noise) if prior > 0 else np.zeros_like(noise)  # (B,), of the observed gaps
    quantiles = [NormalDist().inv_cdf((m + 0.5) / _POSTERIOR_DRAWS) for m in range(_POSTERIOR_DRAWS)]
    generator = np.random.default_rng(seed + 1)
    normal = generator.permuted(np.tile(quantiles, (len(noise), 1)), axis=1).T  # (M, B)
    posterior_mean = mean + weight * (table.gap - mean)
    return _feasible(table, posterior_mean + normal * np.sqrt(weight * noise))


def _share_distances(table: _Bins, sizes: Array, z: float) -> tuple[float, float]:
    """The distances below and above the estimate that the noise of the shares adds, for sizes |gap| (M, B).

    The limits of a mean with deviation s and skewness g lie z s / sqrt(n) to both sides of
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

    The errors of the M populations differ a little where gaps are at their limits; the values are shifted to their mean
    error, so that they can be compared.
    """
    errors = np.abs(gaps) @ table.share  # (M,)
    if table.variance is None:
        sizes = _binomial_sizes(table, gaps, draws)
    else:
        deviation = np.sqrt(table.share * table.variance / table.examples)  # (B,)
        means = table.share * gaps  # (M, B)
        sizes = np.abs(means[:, :, None] + deviation[:, None] * draws.normal[:, None])  # (M, B, R)
    values = sizes.ravel()[draws.order].sum(2) - errors[:, None] + errors.mean()  # (M, R)
    return np.asarray(values.ravel())


def _binomial_sizes(table: _Bins, gaps: Array, draws: _Draws) -> Array:
    """|count - n_b confidence_b| / n at R quantiles (M B R,) of the binomial count of right answers."""
    posterior_draws, reps, bins = draws.order.shape
    accuracy = np.clip(table.confidence + gaps, 1e-12, 1 - 1e-12)  # (M, B)
    logit = np.log(accuracy / (1 - accuracy))
    none_right = table.share * table.examples * np.log1p(-accuracy)  # log chance of the count 0
    # log chance of each count = log_ways + count * logit + none_right, in place because K is large
    chance = logit[:, draws.bin]  # (M, K)
    chance *= draws.right
    chance += none_right[:, draws.bin]
    chance += draws.log_ways
    np.maximum(chance, -50, out=chance)  # exp takes three times as long where it underflows
    np.exp(chance, out=chance)
    # the chances of each bin sum to 1, so one running sum over all bins gives the number of quantiles up to each count
    np.cumsum(chance, axis=1, out=chance)
    chance *= reps
    chance += 1 - draws.offset
    reached = chance.astype(np.int64)
    reached[:, draws.last] = reps * np.arange(1, bins + 1)
    times = np.diff(reached, axis=1, prepend=0)  # (M, K)
    return np.repeat(np.tile(draws.size, posterior_draws), times.ravel())


def _draw(table: _Bins, reps: int, seed: int) -> _Draws:
    """Latin hypercube draws: every bin has the same R quantiles in a random order, which makes the tails less random.

    Source: McKay, Beckman and Conover, Technometrics 21 (1979).
    """
    count = np.rint(table.share * table.examples).astype(np.int64)
    bins = len(count)
    index = np.repeat(np.arange(bins), count + 1)  # (K,), a bin of n_b examples has the counts 0 to n_b
    last = np.cumsum(count + 1) - 1
    total = count[index].astype(np.float64)
    right = (np.arange(len(index)) - (last - count)[index]).astype(np.float64)
    log_ways = gammaln(total + 1) - gammaln(right + 1) - gammaln(total - right + 1)
    size = np.abs(right - total * table.confidence[index]) / table.examples
    reps_per_draw = -(-reps // _POSTERIOR_DRAWS)  # R, rounded up
    offset = (np.arange(_POSTERIOR_DRAWS)[:, None] + 0.5) / _POSTERIOR_DRAWS
    quantiles = (np.arange(reps_per_draw) + offset) / reps_per_draw  # (M, R)
    normal = np.array([NormalDist().inv_cdf(q) for q in quantiles.ravel().tolist()]).reshape(quantiles.shape)
    places = np.arange(_POSTERIOR_DRAWS * bins * reps_per_draw).reshape(_POSTERIOR_DRAWS, bins, reps_per_draw)
    permuted = np.random.default_rng(seed).permuted(places, axis=2)
    order = np.ascontiguousarray(permuted.transpose(0, 2, 1))  # (M, R, B)
    return _Draws(
        bin=index,
        right=right,
        log_ways=log_ways,
        size=size,
        last=last,
        offset=offset,
        normal=normal,
        order=order,
    )


def _quantile(values: Array, q: float) -> float:
    """The smallest value such that at least a share q of the values is not above it."""
    place = int(np.ceil(q * len(values))) - 1
    return float(np.partition(values, place)[place])
