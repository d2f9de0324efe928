"""Intervals of rates against SciPy; a bootstrap against the law of a mean, pairing, and undefined resamples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from poise.stats import paired_bootstrap, wilson


def test_the_interval_of_a_mean_is_that_of_its_law():
    x = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = paired_bootstrap(lambda i: {"mean": float(x[i].mean())}, 400, reps=4000)["mean"]
    half = 1.96 * x.std() / 20
    assert found.value == x.mean()
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.02)


def test_a_difference_is_paired():
    x = np.random.default_rng(0).normal(0.0, 5.0, 100)
    y = x - np.linspace(0.29, 0.31, 100)  # the same questions, each a little less: only the difference is certain
    found = paired_bootstrap(lambda i: {"x": float(x[i].mean()), "gap": float((x - y)[i].mean())}, 100)
    assert found["x"].high - found["x"].low > 1
    assert (found["gap"].low, found["gap"].high) == pytest.approx((0.3, 0.3), abs=0.005)


def test_resamples_are_those_of_the_seed():
    x = np.arange(30.0)

    def interval(seed: int):
        return paired_bootstrap(lambda i: {"mean": float(x[i].mean())}, 30, reps=50, seed=seed)

    assert interval(7) == interval(7)
    assert interval(7) != interval(8)


def test_undefined_resamples_are_left_out_and_nothing_is_refused():
    y = np.array([1, 0, 0])
    found = paired_bootstrap(lambda i: {"some": 1.0 if y[i].any() else math.nan, "none": math.nan}, 3)
    assert found["some"].value == 1
    assert all(map(math.isnan, found["none"]))
    with pytest.raises(ValueError, match="needs questions"):
        paired_bootstrap(lambda i: {}, 0)


def test_equal_questions_have_no_bootstrap_interval():
    found = paired_bootstrap(lambda i: {"mean": float(np.ones(8)[i].mean())}, 8)["mean"]
    assert found.value == 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(("hits", "count"), [(8, 8), (0, 8), (1, 2), (63, 90), (9_000, 10_000)])
def test_wilson_is_that_of_scipy_and_has_width_where_all_agree(hits, count):
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson(hits / count, count)
    assert 0 <= low < high <= 1
    assert low <= hits / count <= high


@pytest.mark.parametrize(("share", "count"), [(0.5, 0), (1.1, 5), (float("nan"), 5), (0.5, 2.5)])
def test_what_is_no_share_of_examples_is_refused(share, count):
    with pytest.raises(ValueError, match="share"):
        wilson(share, count)
    with pytest.raises(ValueError, match="resamples"):
        paired_bootstrap(lambda i: {}, 3, reps=2.5)
