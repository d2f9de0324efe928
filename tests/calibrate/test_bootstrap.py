"""Intervals against the known law of a mean, pairing, and numbers that some resamples do not have."""

from __future__ import annotations

import math

import numpy as np
import pytest

from poise.calibrate.bootstrap import paired_bootstrap


def test_the_interval_of_a_mean_is_that_of_its_law():
    x = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = paired_bootstrap(lambda i: {"mean": float(x[i].mean())}, 400, reps=4000)["mean"]
    half = 1.96 * x.std() / 20
    assert found.value == x.mean()
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.02)


def test_a_difference_is_paired():
    x = np.random.default_rng(0).normal(0.0, 5.0, 100)
    y = x - 0.3  # the same questions, each a little less: the difference is certain although neither mean is
    found = paired_bootstrap(lambda i: {"x": float(x[i].mean()), "gap": float((x - y)[i].mean())}, 100)
    assert found["x"].high - found["x"].low > 1
    assert (found["gap"].low, found["gap"].high) == pytest.approx((0.3, 0.3))


def test_resamples_are_those_of_the_seed():
    x = np.arange(30.0)

    def interval(seed: int):
        return paired_bootstrap(lambda i: {"mean": float(x[i].mean())}, 30, reps=50, seed=seed)

    assert interval(7) == interval(7)
    assert interval(7) != interval(8)


def test_undefined_resamples_are_left_out_and_nothing_is_refused():
    y = np.array([1, 0, 0])
    found = paired_bootstrap(lambda i: {"some": 1.0 if y[i].any() else math.nan, "none": math.nan}, 3)
    assert found["some"] == (1, 1, 1)
    assert all(map(math.isnan, found["none"]))
    with pytest.raises(ValueError, match="needs questions"):
        paired_bootstrap(lambda i: {}, 0)
