r"""Confidence of a language model from repeated answers: Sem1, and Sem2, which has no selection bias.

n answers to a question fall into classes of equal meaning with counts c_k. Sem1 is max_k c_k / n. It chooses and scores
the class on the same answers, so it is too large. Sem2 splits the answers: the modal class z_S of s = floor(n/2)
answers is scored by its share of the other m = n - s. Its mean over all splits is computed here in exact integers:

    Sem2 = E_S (c_z - t_z) / m,   z = z_S,   t_k = answers of class k in S,   P(t) = prod_k C(c_k, t_k) / C(n, s)

E Sem2 is the probability that the model gives to z_S, for every s, m >= 1; 0 <= Sem2 <= Sem1 for every question.

Samples without an answer (a response that was cut at its largest length, or is blank) are not a class: their agreement
is not confidence. They count among the n samples of a share, since the model gave its deployed answer that much less
often, but they are never deployed. A half that holds nothing else deploys no class and scores 0.

Source: semantic calibration error (arXiv 2605.08432) and the sampling protocol of its release.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import comb, log, nan
from typing import Literal

import numpy as np

__all__ = ["Ties", "entropy", "graded_over_splits", "margin", "sem1", "sem2_exact", "sem2_splits"]

Ties = Literal["uniform", "lowest"]
"""Which of several modal classes a split deploys: each with equal probability, or the one of the lowest index."""

_Ways = dict[tuple[int, int], int]
"""The number of ways to choose answers, by (how many were chosen, how many classes tie with the marked one)."""


def sem1(counts: Sequence[int], *, unanswered: int = 0) -> float:
    """The share of the largest class among all samples: answers with class `counts` [K], and `unanswered` ones.

    ValueError without any answer, and for counts that are not whole numbers.
    """
    classes = _checked(counts)
    return max(classes) / (sum(classes) + _whole(unanswered, "unanswered"))


def margin(counts: Sequence[int]) -> float:
    """The difference of the two largest shares; 1 for a single class. ValueError without any answer."""
    classes = _checked(counts)
    first, second, *_ = sorted((*classes, 0), reverse=True)  # the 0 stands for the second of a single class
    return (first - second) / sum(classes)


def entropy(counts: Sequence[int]) -> float:
    """Discrete semantic entropy -sum_k p_k ln p_k of the shares (nats). Source: Farquhar et al., Nature 630 (2024)."""
    classes = _checked(counts)
    n = sum(classes)
    return sum(count / n * log(n / count) for count in classes if count)


def sem2_exact(counts: Sequence[int], ties: Ties = "uniform", *, s: int | None = None, unanswered: int = 0) -> float:
    """Sem2 averaged over all C(n, s) splits of n samples: answers with class `counts` [K], and `unanswered` ones.

    `s` samples choose the class (default: half, rounded down). With ties="lowest" the order of the classes matters:
    pass them in order of first occurrence, not in the order of a judge's list. NaN for fewer than two samples.
    ValueError without any answer, and for invalid counts, s or ties.
    """
    classes = _checked(counts)
    unanswered = _whole(unanswered, "unanswered")
    n = sum(classes) + unanswered
    if n < 2:
        return nan
    # with uniform ties the order does not matter, and sorted counts are found in the cache more often
    order = classes if ties == "lowest" else tuple(sorted(classes))
    return _sem2(order, ties, _split_size(n, s), unanswered)


def graded_over_splits(
    counts: Sequence[int],
    grades: Sequence[int],
    ties: Ties = "uniform",
    *,
    s: int | None = None,
    unanswered: int = 0,
) -> float:
    """sum_k P(z_S = k) grade_k: the probability that the class that a split deploys is correct.

    `grades` [K] are 0 or 1. Sem2 estimates the expectation of this label, question by question. NaN for fewer than two
    samples.
    """
    classes = _checked(counts)
    unanswered = _whole(unanswered, "unanswered")
    if len(grades) != len(classes) or any(grade not in (0, 1) for grade in grades):
        raise ValueError(f"{len(classes)} classes need as many grades of 0 or 1, not {list(grades)}")
    n = sum(classes) + unanswered
    if n < 2:
        return nan

    def grade(k: int, t: int) -> int:
        return int(grades[k])

    return float(_mean_over_splits(classes, unanswered, _split_size(n, s), ties, grade))


def sem2_splits(assignments: Sequence[int], R: int = 10, seed: int = 0) -> float:  # noqa: N803
    """Sem2 averaged over `R` random splits of the class indices `assignments` [n], drawn as in the release.

    Each question has a new `numpy.random.default_rng(seed)`, each split one permutation, and ties go to the lowest
    index. Its noise (about .03 for n = 50, R = 10) is as large as the effects that are measured; it exists to reproduce
    the numbers of the release. NaN for fewer than two answers.
    """
    labels = np.array([_whole(label, "a class index") for label in assignments], dtype=np.int64)
    if _whole(R, "R") < 1:
        raise ValueError(f"needs at least one split, not R={R}")
    if len(labels) < 2:
        return nan
    generator = np.random.default_rng(seed)
    shares = []
    for _ in range(int(R)):
        permuted = labels[generator.permutation(len(labels))]
        choosing, scored = np.split(permuted, [len(labels) // 2])
        deployed = np.bincount(choosing).argmax()
        shares.append(np.mean(scored == deployed))
    return float(np.mean(shares))


def _checked(counts: Sequence[int]) -> tuple[int, ...]:
    """`counts` as ints. ValueError unless they are whole numbers with a positive sum."""
    classes = tuple(_whole(count, "each of the counts") for count in counts)
    if not any(classes):
        raise ValueError(f"needs counts with at least one answer, not {list(counts)}")
    return classes


def _whole(value: float, name: str) -> int:
    """`value` as an int. ValueError unless it is a whole number of at least 0: 3.0 is accepted, 2.9 is not."""
    if not value >= 0 or value != int(value):
        raise ValueError(f"{name} is a whole number that is not negative, not {value}")
    return int(value)


def _split_size(n: int, s: int | None) -> int:
    """The number of samples of a split that choose the class; by default half, rounded down."""
    size = n // 2 if s is None else s
    if not 1 <= size < n or size != int(size):
        raise ValueError(f"a split of {n} answers chooses by 1 to {n - 1} of them, not {size}")
    return int(size)


@lru_cache(maxsize=65536)
def _sem2(counts: tuple[int, ...], ties: Ties, s: int, unanswered: int) -> float:
    def unchosen(k: int, t: int) -> int:
        return counts[k] - t

    mean = _mean_over_splits(counts, unanswered, s, ties, unchosen)
    return float(mean / (sum(counts) + unanswered - s))


def _mean_over_splits(
    counts: tuple[int, ...], unanswered: int, s: int, ties: Ties, value: Callable[[int, int], int]
) -> Fraction:
    """E_S value(z_S, t) over all splits, t being the number of answers of the deployed class z_S in S."""
    if ties not in ("uniform", "lowest"):
        raise ValueError(f"ties are 'uniform' or 'lowest', not {ties!r}")
    total = Fraction(0)
    for t in range(1, min(max(counts), s) + 1):
        winning = _winning(counts, unanswered, s, t, ties, value)
        # each of the 1 + tied modal classes is marked in turn: every split would be counted so often
        total += sum(Fraction(ways, 1 + tied) for (_, tied), ways in winning.items())
    return total / comb(sum(counts) + unanswered, s)


def _winning(
    counts: tuple[int, ...], unanswered: int, s: int, t: int, ties: Ties, value: Callable[[int, int], int]
) -> _Ways:
    """The ways to choose s samples in which one class, the marked one, has t answers and wins, weighted by `value`.

    It is a product of polynomials, one per class. A class other than the marked one may have at most t answers; with
    lowest ties, a class before the marked one must have fewer. With uniform ties the tied classes are counted, since
    each of them is marked in turn. Any number of samples without an answer may be chosen: they never win.
    """
    # both hold the choices from the classes so far: without a marked class, and with one
    unmarked = _Ways({(u, 0): comb(unanswered, u) for u in range(min(unanswered, s) + 1)})
    marked = _Ways()
    for k, count in enumerate(counts):
        # terms of this class: (answers chosen, whether it ties, number of ways)
        others = [(u, int(ties == "uniform" and u == t), comb(count, u)) for u in range(min(count, t) + 1)]
        mark = [(t, 0, comb(count, t) * value(k, t))]
        marked = _sum(_times(marked, others, s), _times(unmarked, mark, s))
        unmarked = _times(unmarked, others if ties == "uniform" else others[:t], s)
    return {(size, tied): ways for (size, tied), ways in marked.items() if size == s}


def _times(ways: _Ways, factor: list[tuple[int, int, int]], s: int) -> _Ways:
    """The product of two polynomials, without the terms of a degree above s."""
    product = _Ways()
    for (size, tied), coefficient in ways.items():
        for u, tie, factor_coefficient in factor:
            if size + u <= s:
                key = (size + u, tied + tie)
                product[key] = product.get(key, 0) + coefficient * factor_coefficient
    return product


def _sum(left: _Ways, right: _Ways) -> _Ways:
    """The sum of two polynomials."""
    return {key: left.get(key, 0) + right.get(key, 0) for key in left | right}
