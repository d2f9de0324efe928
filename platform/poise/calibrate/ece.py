"""Calibration errors (ECE and its variants), and the Brier score and AUROC that are reported with them.

Everywhere `conf` [N] are confidences in [0, 1] and `correct` [N] grades in [0, 1]; N = 0 gives NaN. All errors are
biased upwards by the noise of the grades: `noise_floor` is the error that a calibrated model would show, `debiased_ece`
removes most of the bias from the L2 error, and `ece_interval.unbiased_ece` estimates the L1 error without the bias,
with an interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, pi
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.fft import dct, idct
from scipy.stats import rankdata

__all__ = [
    "Bins",
    "Edges",
    "auroc",
    "bin_indices",
    "brier",
    "checked_pair",
    "classwise_ece",
    "debiased_ece",
    "ece",
    "noise_floor",
    "reliability",
    "smooth_ece",
]

Array = NDArray[np.float64]

Edges = Literal["integer", "linspace", "mass"]
"""integer: equal width with exact edges, right for multiples of 1/n. linspace: equal width with floating-point edges,
as in most code; they put .3, .6 and .7 into the wrong bin. mass: edges at quantiles; equal values share a bin."""

_CELLS = 1024  # of the grid of `smooth_ece`


@dataclass(frozen=True)
class Bins:
    """The bins that are not empty: [low, high), the last one closed; number of examples and their means; all [B]."""

    low: Array
    high: Array
    count: Array
    confidence: Array
    accuracy: Array


def reliability(conf: ArrayLike, correct: ArrayLike, bins: int = 10, edges: Edges = "integer") -> Bins:
    """The data of a reliability diagram; bins without examples are left out."""
    c, y = checked_pair(conf, correct)
    limits, index = bin_indices(c, bins, edges)
    count = np.bincount(index, minlength=len(limits) - 1)
    full = count > 0
    return Bins(
        low=limits[:-1][full],
        high=limits[1:][full],
        count=count[full].astype(float),
        confidence=np.bincount(index, c, len(count))[full] / count[full],
        accuracy=np.bincount(index, y, len(count))[full] / count[full],
    )


def ece(conf: ArrayLike, correct: ArrayLike, bins: int = 10, edges: Edges = "integer") -> float:
    """Expected calibration error in L1: sum_b (n_b / N) |mean confidence - mean grade|, over bins [low, high).

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017.
    """
    b = reliability(conf, correct, bins, edges)
    if not len(b.count):
        return nan
    return float(b.count @ np.abs(b.confidence - b.accuracy) / b.count.sum())


def debiased_ece(conf: ArrayLike, correct: ArrayLike, bins: int = 10, edges: Edges = "integer") -> float:
    """L2 calibration error without the variance of grades: sqrt max(0, sum_b n_b/N [(c - y)^2 - y(1 - y)/(n_b - 1)]).

    A bin with a single example adds nothing. ValueError for grades other than 0 and 1. Source: Kumar, Liang and Ma,
    Verified uncertainty calibration, NeurIPS 2019.
    """
    b = reliability(conf, _binary(correct), bins, edges)
    if not len(b.count):
        return nan
    noise = b.accuracy * (1 - b.accuracy) / np.maximum(b.count - 1, 1)  # the variance of each bin's accuracy
    terms = np.where(b.count > 1, (b.confidence - b.accuracy) ** 2 - noise, 0.0)
    return float(np.sqrt(max(0.0, b.count @ terms / b.count.sum())))


def smooth_ece(conf: ArrayLike, correct: ArrayLike, *, ends: Literal["half", "full"] = "half") -> float:
    """smECE: mean magnitude of the residual y - c after a reflected Gaussian blur whose width equals the result.

    The width is the smallest multiple of 1/1024 that is not below the result. With reflection at 0 and 1, the blur
    damps the k-th cosine by exp(-(pi k width)^2 / 2). The authors' package relplot gives confidences of exactly 0 or 1
    half a weight, so that a spike at 1 counts half: ends="half" agrees with it to 1e-3, ends="full" is the definition
    of the paper. Source: Blasiok and Nakkiran, Smooth ECE, ICLR 2024.
    """
    c, y = checked_pair(conf, correct)
    if ends not in ("half", "full"):
        raise ValueError(f"ends are 'half' or 'full', not {ends!r}")
    if not len(c):
        return nan
    end_weight = 0.5 if ends == "half" else 1.0
    weight = np.where((c == 0) | (c == 1), end_weight, 1.0)
    residuals = _to_grid(c, weight * (y - c) / weight.sum())  # (cells,)
    spectrum = dct(residuals)
    damping = (pi * np.arange(_CELLS)) ** 2 / 2

    def error(width: float) -> float:
        blurred = idct(spectrum * np.exp(-damping * width**2))
        return float(np.abs(blurred).sum())

    # bisection to 1/1024 = 2^-10: the error falls with the width
    low = 0.0
    high = 1.0
    for _ in range(10):
        width = (low + high) / 2
        if width < error(width):
            low = width
        else:
            high = width
    return error(high)


def brier(conf: ArrayLike, correct: ArrayLike) -> float:
    """mean (c - y)^2. Source: Brier, Monthly Weather Review 1950."""
    c, y = checked_pair(conf, correct)
    return float(np.mean((c - y) ** 2)) if len(c) else nan


def auroc(conf: ArrayLike, correct: ArrayLike) -> float:
    """The probability that a correct example has more confidence than a wrong one; ties count half.

    NaN where all or none are correct; ValueError for grades other than 0 and 1.
    """
    c, y = checked_pair(conf, _binary(correct))
    right = int(y.sum())
    wrong = len(y) - right
    if not right or not wrong:
        return nan
    rank_sum = rankdata(c)[y == 1].sum()  # the Mann-Whitney statistic
    return float((rank_sum - right * (right + 1) / 2) / (right * wrong))


def classwise_ece(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10, edges: Edges = "integer") -> float:
    """Mean over K classes of the ECE of each class: `probabilities` [N, K] against labels [N] in 0..K-1.

    For a label set that all questions share. ValueError for rows that are not a distribution (to 1e-4, the rounding of
    a softmax in half precision), and for labels that are not whole numbers. Source: Kull et al., NeurIPS 2019.
    """
    p = np.asarray(probabilities, dtype=float)
    y = np.asarray(labels)
    if p.ndim != 2 or y.shape != p.shape[:1] or (len(y) and not np.isin(y, np.arange(p.shape[1])).all()):
        raise ValueError(f"needs probabilities [N, K] and labels [N] in 0..K-1, not {p.shape} and {y.shape}")
    if not (np.abs(p.sum(1) - 1) <= 1e-4 * max(1, p.shape[1] ** 0.5)).all():
        raise ValueError("each row of probabilities adds up to 1; logits need a softmax first")
    return float(np.mean([ece(p[:, k], y == k, bins, edges) for k in range(p.shape[1])]))


def noise_floor(conf: ArrayLike, bins: int = 10, edges: Edges = "integer", *, reps: int = 200, seed: int = 0) -> float:
    """The mean ECE of a calibrated model with these confidences: grades are drawn with probability `conf`."""
    c, _ = checked_pair(conf, np.zeros(np.shape(conf)))
    if reps < 1 or reps != int(reps):
        raise ValueError(f"needs at least one draw, not {reps}")
    if not len(c):
        return nan
    drawn_grades = np.random.default_rng(seed).random((reps, len(c))) < c  # (reps, N)
    return float(np.mean([ece(c, grades, bins, edges) for grades in drawn_grades]))


def checked_pair(conf: ArrayLike, correct: ArrayLike) -> tuple[Array, Array]:
    """Confidences and grades as float64 [N]. ValueError unless they have one length and all lie in [0, 1]."""
    c = np.asarray(conf, dtype=float)
    y = np.asarray(correct, dtype=float)
    if c.ndim != 1 or c.shape != y.shape:
        raise ValueError(f"needs as many grades as confidences, not {c.shape} and {y.shape}")
    in_range = ((c >= 0) & (c <= 1)).all() and ((y >= 0) & (y <= 1)).all()  # False for NaN too
    if not in_range:
        raise ValueError("confidences and grades lie between 0 and 1")
    return c, y


def _binary(correct: ArrayLike) -> Array:
    y = np.asarray(correct, dtype=float)
    if not np.isin(y, (0, 1)).all():
        raise ValueError("this measure needs grades that are 0 or 1")
    return y


def bin_indices(c: Array, bins: int, edges: Edges) -> tuple[Array, NDArray[np.int64]]:
    """Limits of the bins [B + 1] and the bin of each confidence [N]."""
    if bins < 1 or bins != int(bins) or edges not in ("integer", "linspace", "mass"):
        raise ValueError(f"needs at least one bin with edges integer, linspace or mass, not {bins}, {edges!r}")
    bins = int(bins)
    limits = np.linspace(0.0, 1.0, bins + 1)
    if edges == "integer":
        index = np.floor(c * bins + 1e-12)  # a multiple of 1/bins must not round down into the bin below
        return limits, np.minimum(index, bins - 1).astype(np.int64)
    if edges == "mass" and len(c):
        limits = np.unique(np.quantile(c, limits))
    if len(limits) == 1:  # all confidences are equal
        limits = np.repeat(limits, 2)
    index = np.searchsorted(limits, c, side="right") - 1
    return limits, index.clip(0, len(limits) - 2).astype(np.int64)


def _to_grid(c: Array, mass: Array) -> Array:
    """`mass` at the places `c` on a grid of cells: linearly shared by the two cells whose centres are nearest."""
    place = np.clip(c * _CELLS - 0.5, 0, _CELLS - 1)
    left = np.minimum(place.astype(np.int64), _CELLS - 2)
    right_share = place - left
    cells = np.zeros(_CELLS)
    np.add.at(cells, left, mass * (1 - right_share))
    np.add.at(cells, left + 1, mass * right_share)
    return cells
