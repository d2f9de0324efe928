"""Sem1 and Sem2 against brute force over all splits, closed forms of expectations, and known figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from poise.calibrate.ece import brier, ece
from poise.calibrate.sem_ece import entropy, graded_over_splits, margin, sem1, sem2_exact, sem2_splits

PARTITIONS = st.lists(st.integers(0, 5), min_size=2, max_size=5).filter(lambda counts: 2 <= sum(counts) <= 10)
TIES = ("uniform", "lowest")


def over_all_splits(
    counts: Sequence[int], ties: str, s: int, value: Callable[[int, float], float], unanswered: int = 0
) -> float:
    """The mean of value(deployed class, its share of the other samples) over every choice of s samples."""
    answers = [k for k, count in enumerate(counts) for _ in range(count)] + [-1] * unanswered
    total, splits = 0.0, list(combinations(range(len(answers)), s))
    for chosen in splits:
        inside = [sum(answers[i] == k for i in chosen) for k in range(len(counts))]
        if not any(inside):
            continue  # nothing was answered: nothing is deployed
        winners = [k for k in range(len(counts)) if inside[k] == max(inside)]
        winners = winners if ties == "uniform" else winners[:1]
        shares = {k: (counts[k] - inside[k]) / (len(answers) - s) for k in winners}
        total += sum(value(k, shares[k]) for k in winners) / len(winners)
    return total / len(splits)


def compositions(n: int, classes: int) -> Iterator[tuple[int, ...]]:
    if classes == 1:
        yield (n,)
        return
    for first in range(n + 1):
        for rest in compositions(n - first, classes - 1):
            yield (first, *rest)


def probability(counts: Sequence[int], pi: Sequence[float]) -> float:
    ways = math.factorial(sum(counts)) // math.prod(math.factorial(c) for c in counts)
    return ways * math.prod(p**c for p, c in zip(pi, counts, strict=True))


def deployed(counts: Sequence[int], ties: str = "uniform") -> list[int]:
    modal = [k for k, count in enumerate(counts) if count == max(counts)]
    return modal if ties == "uniform" else modal[:1]


def expectation(pi: Sequence[float], n: int, value: Callable[[tuple[int, ...]], float]) -> float:
    return sum(probability(c, pi) * value(c) for c in compositions(n, len(pi)))


@given(PARTITIONS, st.sampled_from(TIES), st.data())
@settings(max_examples=120, deadline=None)
def test_exact_equals_brute_force_over_all_splits(counts, ties, data):
    silent = data.draw(st.integers(0, 3 if sum(counts) < 8 else 0))
    s = data.draw(st.integers(1, sum(counts) + silent - 1))
    grades = data.draw(st.lists(st.integers(0, 1), min_size=len(counts), max_size=len(counts)))
    assert sem2_exact(counts, ties, s=s, unanswered=silent) == pytest.approx(
        over_all_splits(counts, ties, s, lambda k, share: share, silent)
    )
    assert graded_over_splits(counts, grades, ties, s=s, unanswered=silent) == pytest.approx(
        over_all_splits(counts, ties, s, lambda k, share: grades[k], silent)
    )
    assert 0 <= sem2_exact(counts, unanswered=silent) <= sem1(counts, unanswered=silent)


@pytest.mark.parametrize(
    ("counts", "lowest", "uniform"),
    [
        ([21, 16, 11, 2], 0.3703523184, 0.3587124493),
        ([25, 25], 0.4421531161, 0.4421531161),
        ([2, 1, 1], 1 / 3, 1 / 6),
        ([2, 2], 1 / 3, 1 / 3),
        ([3, 1], 0.75, 0.5),
        ([1] * 6, 0, 0),
        ([50], 1, 1),
    ],
)
def test_known_values(counts, lowest, uniform):
    assert sem2_exact(counts, "lowest") == pytest.approx(lowest, abs=1e-10)
    assert sem2_exact(counts, "uniform") == pytest.approx(uniform, abs=1e-10)


@given(PARTITIONS)
def test_sem2_lies_between_zero_and_sem1_and_uniform_ties_ignore_the_order(counts):
    assert 0 <= sem2_exact(counts) <= sem1(counts)
    assert 0 <= sem2_exact(counts, "lowest") <= sem1(counts)
    assert sem2_exact(counts) == sem2_exact(counts[::-1])


def test_parity_with_the_release_on_sorted_assignments():
    sorted_assignments = [k for k, count in enumerate([21, 16, 11, 2]) for _ in range(count)]
    assert sem2_splits(sorted_assignments, 10, 0) == pytest.approx(0.32)
    assert sem2_splits([0] * 25 + [1] * 25, 10, 0) == pytest.approx(0.452)


def test_drawn_splits_scatter_round_the_exact_mean_as_known():
    assignments = [k for k, count in enumerate([21, 16, 11, 2]) for _ in range(count)]
    for R, known in ((10, 0.028), (1, 0.089)):
        drawn = [sem2_splits(assignments, R, seed) for seed in range(400)]
        assert np.mean(drawn) == pytest.approx(sem2_exact([21, 16, 11, 2], "lowest"), abs=4 * known / 20)
        assert np.std(drawn) == pytest.approx(known, rel=0.15)


@pytest.mark.parametrize(
    ("pi", "first", "second", "truth"),
    [
        ((0.5, 0.5), 0.623047, 0.5, 0.5),
        ((0.6, 0.4), 0.647016, 0.536512, 0.546686),
        ((0.7, 0.3), 0.711936, 0.634768, 0.660477),
        ((0.25,) * 4, 0.419750, 0.25, 0.25),
    ],
)
def test_expectations_over_ten_answers(pi, first, second, truth):
    assert expectation(pi, 10, sem1) == pytest.approx(first, abs=1e-6)
    assert expectation(pi, 10, sem2_exact) == pytest.approx(second, abs=1e-6)
    assert expectation(pi, 10, lambda c: np.mean([pi[k] for k in deployed(c)])) == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize(("n", "s"), [(2, 1), (6, 1), (6, 3), (7, 5)])
def test_sem2_is_unbiased_for_what_it_deploys_with_any_split(ties, n, s):
    """E Sem2 = E pi(z_S), where z_S is the modal class of s answers."""
    pi = (0.45, 0.3, 0.25)
    truth = expectation(pi, s, lambda c: np.mean([pi[k] for k in deployed(c, ties)]))
    assert expectation(pi, n, lambda c: sem2_exact(c, ties, s=s)) == pytest.approx(truth, abs=1e-12)


def test_the_graded_split_has_the_expectation_of_its_own_label():
    pi, grades = (0.6, 0.4), (1, 0)
    wins = expectation(pi, 5, lambda c: np.mean([grades[k] for k in deployed(c)]))
    assert expectation(pi, 10, lambda c: graded_over_splits(c, grades)) == pytest.approx(wins, abs=1e-12)


@pytest.mark.parametrize(("scale", "exact", "law"), [(0.5, 0.044878, 0.045688), (0.0, 0.056138, 0.056419)])
def test_the_local_law_of_the_gap_at_two_close_classes(scale, exact, law):
    n = 50
    limit = norm.pdf(2 * scale) - 2 * scale * norm.cdf(-2 * scale) + 2 * scale * norm.cdf(-math.sqrt(2) * scale)
    assert limit / math.sqrt(n) == pytest.approx(law, abs=1e-6)
    pi = (0.5 + scale / math.sqrt(n), 0.5 - scale / math.sqrt(n))
    assert expectation(pi, n, lambda c: sem1(c) - sem2_exact(c)) == pytest.approx(exact, abs=1e-6)


def infinite_questions(pi: Sequence[float], chance: Sequence[float], confidence: Callable[[tuple[int, ...]], float]):
    """ECE over 10 exact bins, mean confidence, mean grade of infinitely many questions; `chance` is P(correct | k)."""
    bins, means = np.zeros((10, 2)), np.zeros(2)
    for counts in compositions(10, len(pi)):
        c, y = confidence(counts), np.mean([chance[k] for k in deployed(counts)])
        row = probability(counts, pi) * np.array([c, y])
        bins[min(9, int(c * 10 + 1e-12))] += row
        means += row
    return float(np.abs(bins[:, 0] - bins[:, 1]).sum()), *means


def test_worlds_of_infinitely_many_questions():
    """A calibrated model: Sem2-ECE is the larger. An over-confident one: the errors differ as the confidences do."""
    first, second = (infinite_questions((0.6, 0.4), (0.6, 0.4), score) for score in (sem1, sem2_exact))
    assert first == pytest.approx((0.100329, 0.647016, 0.546686), abs=1e-6)
    assert second == pytest.approx((0.123332, 0.536512, 0.546686), abs=1e-6)
    first, second = (infinite_questions((0.6, 0.4), (0.3, 0.2), score) for score in (sem1, sem2_exact))
    assert (first[0], second[0]) == pytest.approx((0.373672, 0.263169), abs=1e-6)
    assert first[0] - second[0] == pytest.approx(first[1] - second[1], abs=1e-12)


def test_entropy_and_margin():
    se = entropy([21, 16, 11, 2])
    assert se == pytest.approx(1.190832343, abs=1e-9)
    assert math.exp(-se) == pytest.approx(0.303968153, abs=1e-9)
    assert 1 - se / math.log(4) == pytest.approx(0.140996042, abs=1e-9)
    assert margin([21, 16, 11, 2]) == pytest.approx(0.1)
    assert (margin([7]), margin([3, 3]), entropy([7])) == (1, 0, 0)


def test_edges_and_errors():
    assert math.isnan(sem2_exact([1]))
    assert math.isnan(sem2_splits([0]))
    assert math.isnan(graded_over_splits([1], [1]))
    assert sem1([1, 1, 1]) == 1 / 3
    for wrong in ([], [0, 0], [2, -1]):
        with pytest.raises(ValueError, match="counts"):
            sem2_exact(wrong)
    with pytest.raises(ValueError, match="chooses by 1 to 3"):
        sem2_exact([2, 2], s=4)
    with pytest.raises(ValueError, match="ties"):
        sem2_exact([2, 2], "first")
    with pytest.raises(ValueError, match="as many grades"):
        graded_over_splits([2, 2], [1])
    with pytest.raises(ValueError, match="at least one split"):
        sem2_splits([0, 1], 0)


def test_the_fixture_of_ten_thousand_answers(fixture):
    known = fixture["expected"]
    y, assignments = fixture["y"], fixture["assignments"]
    counts = [np.bincount(row).tolist() for row in assignments]
    first = [sem1(row) for row in counts]
    uniform, lowest = ([sem2_exact(row, ties) for row in counts] for ties in TIES)
    drawn = [sem2_splits(row, 10, 0) for row in assignments]
    assert np.mean(first) == pytest.approx(known["mean_sem1"], abs=1e-12)
    assert np.mean(uniform) == pytest.approx(known["mean_sem2_exact_uniform"], abs=1e-12)
    assert np.mean(lowest) == pytest.approx(known["mean_sem2_exact_lowest"], abs=1e-12)
    assert np.mean(drawn) == pytest.approx(known["mean_sem2_R10_seed0_lowest"], abs=1e-12)
    assert ece(first, y) == pytest.approx(known["ece10_int_sem1"], abs=1e-12)
    assert ece(first, y, edges="linspace") == pytest.approx(known["ece10_linspace_sem1"], abs=1e-12)
    assert ece(drawn, y, edges="linspace") == pytest.approx(known["ece10_linspace_sem2_R10"], abs=1e-12)
    assert ece(uniform, y, edges="linspace") == pytest.approx(known["ece10_linspace_sem2_exact_uniform"], abs=1e-12)
    assert (brier(first, y), brier(drawn, y)) == pytest.approx((known["brier_sem1"], known["brier_sem2_R10"]), abs=1e-9)
    assert np.mean(y) == known["accuracy"]
    assert np.mean(np.array(drawn) > np.array(first)) == pytest.approx(0.185)


def test_the_fixtures_splits_and_populations(fixture):
    for case in fixture["exact_split_cases"]:
        assert sem2_exact(case["counts"], case["tie"], s=case["s"]) == pytest.approx(case["value"], abs=1e-14)
    for case in fixture["population_cases"]:
        pi, n = case["pi"], case["n"]
        if math.comb(n + len(pi) - 1, n) > 1000:
            continue  # enumerating all counts takes too long
        assert expectation(pi, n, sem1) == pytest.approx(case["E_sem1"], abs=1e-12)
        for ties in TIES:
            told = case[f"E_sem2_half_{ties}"], case[f"E_pi_deployed_{ties}"]
            truth = expectation(pi, n, lambda c, pi=pi, ties=ties: np.mean([pi[k] for k in deployed(c, ties)]))
            second = expectation(pi, n, lambda c, ties=ties: sem2_exact(c, ties) if sum(c) else 0)
            assert (second, truth) == pytest.approx(told, abs=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sem1([2.9, 1]),
        lambda: sem1([2, 1], unanswered=0.5),
        lambda: sem1([2, -1]),
        lambda: sem1([2, math.nan]),
        lambda: margin([2.9, 1]),
        lambda: entropy([0.5, 0.5]),
        lambda: sem2_exact([2.9, 1.9]),
        lambda: sem2_exact([4, 2], s=2.5),
        lambda: graded_over_splits([2, 1.5], [1, 0]),
        lambda: graded_over_splits([2, 2], [0.5, 1]),
        lambda: sem2_splits([0.9, 1, 1]),
        lambda: sem2_splits([0, 1, -1]),
        lambda: sem2_splits([0, 1], R=1.5),
    ],
)
def test_a_number_that_is_no_count_is_never_cut_to_one(call):
    with pytest.raises(ValueError, match="not"):
        call()


def test_whole_numbers_of_any_type_are_counts():
    assert sem1(np.array([3.0, 1.0])) == sem1([3, 1]) == 0.75
    assert sem2_exact(np.array([3, 1])) == sem2_exact([3.0, 1]) == 0.5
