"""The interval of ECE against the truth of simulated worlds, calibrated and not, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from poise.calibrate.ece import ece
from poise.calibrate.ece_interval import unbiased_ece
from poise.calibrate.sem_ece import sem1, sem2_exact
from poise.stats import paired_bootstrap, wilson

WORLDS = 100
OVER = {"calibrated": 0.0, "slightly over-confident": 0.03, "over-confident": 0.1, "far over-confident": 0.25}


def agreement(estimate, draw: np.random.Generator, size: int = 4000) -> np.ndarray:
    """Confidences of questions with four meanings and ten answers each, on the grid of the estimate."""
    counts = [draw.multinomial(10, pi) for pi in draw.dirichlet([0.5] * 4, size)]
    return np.array([estimate(tuple(map(int, row))) for row in counts])


@pytest.fixture(scope="module")
def populations() -> dict[str, np.ndarray]:
    """Confidences of all questions there are: those of a sample are drawn from them."""
    draw = np.random.default_rng(0)
    spike = np.where(draw.random(4000) < 0.4, 1.0, draw.beta(2, 1, 4000))
    return {"spread": draw.random(4000), "a spike at 1": spike} | {
        "Sem1": agreement(sem1, draw),
        "Sem2": agreement(sem2_exact, draw),
    }


def true_ece(conf: np.ndarray, chance: np.ndarray) -> float:
    """Over ten bins of the whole population, by the definition."""
    index = np.minimum(np.floor(conf * 10 + 1e-12), 9)
    parts = [(inside.mean(), (chance - conf)[inside].mean()) for b in range(10) if (inside := index == b).any()]
    return sum(share * abs(gap) for share, gap in parts)


def coverage(conf: np.ndarray, chance: np.ndarray, n: int, samples: int = WORLDS) -> float:
    truth, draw, covered = true_ece(conf, chance), np.random.default_rng(n), []
    for _ in range(samples):
        rows = draw.integers(0, len(conf), n)
        found = unbiased_ece(conf[rows], draw.random(n) < chance[rows], reps=200)
        assert found.low - 1e-3 <= found.value <= found.high + 1e-3, "the estimate lies outside of its own interval"
        covered.append(found.low <= truth + 1e-9 and truth <= found.high + 1e-9)
    return float(np.mean(covered))


@pytest.mark.parametrize("over", OVER.values(), ids=OVER)
@pytest.mark.parametrize(("name", "n"), [("spread", 500), ("a spike at 1", 128), ("Sem1", 128), ("Sem2", 500)])
def test_the_interval_covers_the_truth_whether_a_model_is_calibrated_or_not(populations, name, n, over):
    conf = populations[name]
    assert 0.9 <= coverage(conf, np.clip(conf - over, 0, 1), n) <= 0.995


@pytest.mark.parametrize("n", [40, 500])
def test_it_covers_where_a_model_is_too_sure_above_and_too_modest_below(populations, n):
    conf = populations["spread"]
    odds = (conf / (1 - conf)) ** 0.6
    assert 0.9 <= coverage(conf, odds / (1 + odds), n) <= 0.995


@pytest.mark.parametrize("name", ["spread", "a spike at 1"])
def test_it_covers_where_few_questions_are_asked_of_a_calibrated_model(populations, name):
    """40 questions leave about 4 in a bin: their grades are far from normal."""
    conf = populations[name]
    assert 0.9 <= coverage(conf, conf, 40, samples=200) <= 0.995


@pytest.mark.parametrize(("name", "accuracy", "n"), [("spread", 0.95, 40), ("Sem1", 0.9, 40), ("low", 0.1, 128)])
def test_it_covers_where_nearly_all_grades_agree_and_confidences_vary(populations, name, accuracy, n):
    conf = np.random.default_rng(0).beta(1, 8, 4000) if name == "low" else populations[name]
    assert 0.9 <= coverage(conf, np.full_like(conf, accuracy), n, samples=200) <= 0.995


@pytest.mark.parametrize("samples", [4, 10])
def test_it_covers_where_equally_likely_answers_are_rarely_right(samples):
    """Six meanings: Sem2 has few values, and an accuracy of 0.1 is above some of them and below others."""
    draw = np.random.default_rng(0)
    counts = draw.multinomial(samples, draw.dirichlet([5.0] * 6, 4000))
    conf = np.array([sem2_exact(tuple(map(int, row))) for row in counts])
    assert 0.9 <= coverage(conf, np.full_like(conf, 0.1), 40, samples=200) <= 0.995


def test_percentiles_of_a_bootstrap_do_not_cover_where_a_model_is_calibrated(populations):
    conf, draw, covered = populations["Sem1"], np.random.default_rng(0), 0
    for _ in range(20):
        rows = draw.integers(0, len(conf), 128)
        c, y = conf[rows], draw.random(128) < conf[rows]
        found = paired_bootstrap(lambda i, c=c, y=y: {"ece": ece(c[i], y[i])}, 128, reps=100)["ece"]
        covered += found.low <= 0 <= found.high
    assert covered == 0


def test_a_calibrated_model_has_an_estimate_of_0_half_of_the_time(populations):
    conf, draw = populations["spread"], np.random.default_rng(0)
    found = []
    for _ in range(200):
        rows = draw.integers(0, len(conf), 200)
        found.append(unbiased_ece(conf[rows], draw.random(200) < conf[rows], reps=200).value)
    assert np.mean(np.array(found) == 0) == pytest.approx(0.5, abs=0.1)


def test_one_bin_far_from_0_has_the_interval_of_a_rate():
    """With one confidence, and errors of one sign only, the interval is Wilson's of the accuracy."""
    found = unbiased_ece([0.9] * 400, [1] * 200 + [0] * 200, reps=20_000)
    low, high = wilson(0.5, 400)
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.9 - high, 0.9 - low), abs=2e-3)


def test_all_right_and_sure_is_no_proof_of_calibration():
    """8 right of 8 with confidence 1: the accuracy may be as low as Wilson's interval says."""
    found = unbiased_ece([1.0] * 8, [1] * 8, reps=20_000)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(1 - wilson(1.0, 8)[0], abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_all_wrong_or_all_right_has_the_width_of_wilsons_interval(count):
    rate = wilson(0.0, count)[1]
    for grade in (0, 1):
        unsure = unbiased_ece([0.25] * count, [grade] * count)
        distance = abs(grade - 0.25)
        assert unsure.low == pytest.approx(max(0, distance - rate))
        assert unsure.high >= distance
        certain = unbiased_ece([float(grade)] * count, [grade] * count)
        assert (certain.value, certain.low) == (0, 0)
        assert certain.high == pytest.approx(rate, abs=0.01)


def test_bins_that_agree_each_have_a_width_together():
    """20 wrong with confidence 0.25 and 20 right with 0.75: a rate of exceptions of 0.088 makes the gaps smaller."""
    found = unbiased_ece([0.25] * 20 + [0.75] * 20, [0] * 20 + [1] * 20)
    assert found.low == pytest.approx(0.25 - wilson(0.0, 40)[1])
    exact = unbiased_ece([0.0] * 20 + [1.0] * 20, [0] * 20 + [1] * 20)
    assert exact.high >= wilson(0.0, 40)[1] - 1e-9


@pytest.mark.parametrize("confidence", [0.0, 0.25, 1.0])
def test_the_coverage_near_accuracies_of_0_and_1_by_the_binomial_distribution(confidence):
    """One confidence and 40 questions: the coverage is a sum over the number of right answers, without sampling."""
    n = 40
    found = [unbiased_ece([confidence] * n, [1] * x + [0] * (n - x)) for x in range(n + 1)]
    for accuracy in (0.03, 0.05, 0.07, 0.1, 0.15, 0.9, 0.95, 0.97):
        truth = abs(accuracy - confidence)
        chances = [math.comb(n, x) * accuracy**x * (1 - accuracy) ** (n - x) for x in range(n + 1)]
        covered = sum(p for p, e in zip(chances, found, strict=True) if e.low - 1e-9 <= truth <= e.high + 1e-9)
        assert covered >= 0.9, accuracy


def test_the_shares_of_the_bins_are_uncertain_where_no_grade_is(populations):
    """Nobody is right: the true error is the mean confidence, and the sample's mean is off by its own noise."""
    conf, draw = np.round(populations["Sem1"] * 4) / 4, np.random.default_rng(1)
    truth, covered = conf.mean(), []
    for _ in range(WORLDS):
        found = unbiased_ece(draw.choice(conf, 40), np.zeros(40), reps=200)
        covered.append(found.low <= truth <= found.high)
    assert np.mean(covered) >= 0.9


def test_one_right_answer_of_40_adds_the_distances_of_a_rate_and_of_a_mean():
    """All gaps have one sign: the error is mean confidence - accuracy, and Wilson's interval is that of the accuracy.

    The noise of both is independent, so that the distances of their ends add up as squares.
    """
    conf = np.array([0.25] * 10 + [0.5] * 25 + [0.75] * 5)
    grades = np.zeros(40)
    grades[20] = 1
    rate = 1 / 40 - wilson(1 / 40, 40)[0]
    mean = 1.96 * np.std(conf, ddof=1) / math.sqrt(40)
    found = unbiased_ece(conf, grades)
    assert found.high == pytest.approx(np.mean(conf - grades) + math.hypot(rate, mean), abs=0.01)


def test_grades_between_0_and_1_have_their_own_variance():
    conf = np.linspace(0.05, 0.95, 300)
    exact = unbiased_ece(conf, conf)
    assert tuple(exact) == (0, 0, 0)  # a model that knows the truth, measured against it
    off = unbiased_ece(conf, conf - 0.04)
    assert tuple(off) == pytest.approx((0.04, 0.04, 0.04), abs=1e-3)


def test_it_is_a_function_of_its_arguments_and_refuses_nonsense():
    draw = np.random.default_rng(0)
    conf, y = draw.random(100), draw.integers(0, 2, 100)
    assert unbiased_ece(conf, y) == unbiased_ece(conf, y)
    narrow, wide = unbiased_ece(conf, y, level=0.5), unbiased_ece(conf, y, level=0.99)
    assert wide.low <= narrow.low < narrow.high < wide.high
    assert all(map(math.isnan, unbiased_ece([], [])))
    for options in ({"level": 1}, {"reps": 0}, {"reps": 2.5}, {"bins": 2.5}):
        with pytest.raises(ValueError, match="at least one"):
            unbiased_ece(conf, y, **options)
