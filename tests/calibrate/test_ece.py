"""Calibration errors against numbers worked by hand, quadrature, and peers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from poise.calibrate.ece import auroc, brier, classwise_ece, debiased_ece, ece, noise_floor, reliability, smooth_ece

CONF = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 0, 0.35, 0.95, 0.95, 0.55]
Y = [0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0]


def test_ece_by_hand():
    assert ece([0.05, 0.15, 0.85, 0.95], [0, 1, 1, 1]) == pytest.approx(0.275)
    assert ece([0.5] * 10, [1] * 7 + [0] * 3, bins=1) == pytest.approx(0.2)


def test_the_edges_are_exact_or_those_of_floating_point():
    assert ece(CONF, Y) == pytest.approx(0.1733333, abs=1e-7)
    assert ece(CONF, Y, edges="linspace") == pytest.approx(0.1866667, abs=1e-7)
    fifty = [k / 50 for k in range(51)]
    exact, floating = (reliability(fifty, [0] * 51, edges=edges).count for edges in ("integer", "linspace"))
    assert exact.tolist() == [5] * 9 + [6]
    assert floating.tolist() == [5, 5, 6, 4, 5, 6, 5, 4, 5, 6]  # .3, .6 and .7 fall one bin too low


@pytest.mark.parametrize("n", [7, 10, 49, 50, 96, 100])
@pytest.mark.parametrize("bins", [10, 15])
def test_integer_edges_put_k_of_n_where_integers_do(n, bins):
    for k in range(n + 1):
        b = reliability([k / n], [1], bins)
        assert b.low[0] == pytest.approx(min(bins - 1, k * bins // n) / bins)


def test_bins_of_equal_mass_never_part_equal_values():
    conf = [1.0] * 12 + [0.2, 0.4, 0.6, 0.8]
    b = reliability(conf, [1] * 16, 4, edges="mass")
    assert b.count.sum() == 16
    assert b.count[-1] >= 12
    assert reliability([0.5] * 5, [1] * 5, 10, edges="mass").count.tolist() == [5]
    rng = np.random.default_rng(0)
    assert set(reliability(rng.random(100), rng.random(100), 10, "mass").count) == {10}


def test_debiased_by_hand_and_a_bin_with_one_example_adds_nothing():
    assert debiased_ece([0.5] * 10, [1] * 7 + [0] * 3, bins=1) == pytest.approx(math.sqrt(0.04 - 0.21 / 9))
    assert debiased_ece([0.5] * 10, [1] * 7 + [0] * 3, bins=1) == pytest.approx(0.1290994, abs=1e-7)
    assert debiased_ece([0.5] * 10 + [0.95], [1] * 5 + [0] * 5 + [0]) == 0.0


def test_debiasing_takes_most_of_the_noise_away():
    rng = np.random.default_rng(0)
    plain, debiased = [], []
    for _ in range(100):
        conf = rng.random(300)
        y = rng.random(300) < conf
        b = reliability(conf, y)
        plain.append(b.count @ (b.confidence - b.accuracy) ** 2 / 300)
        debiased.append(debiased_ece(conf, y) ** 2)
    assert np.mean(debiased) < np.mean(plain) / 2


def smoothed_by_quadrature(conf: np.ndarray, y: np.ndarray, width: float) -> float:
    """The definition: residuals blurred by the Gaussian and its mirror images, mean magnitude over a fine grid."""
    t = (np.arange(20_000) + 0.5) / 20_000
    images = [2 * k + sign * conf for k in (-2, -1, 0, 1, 2) for sign in (1, -1)]
    blur = sum(np.exp(-((t[:, None] - image) ** 2) / (2 * width**2)) for image in images)
    return float(np.abs(blur @ (y - conf) / len(conf)).mean() / (width * math.sqrt(2 * math.pi)))


@pytest.mark.parametrize("seed", [0, 1])
def test_smooth_ece_is_the_fixed_point_of_its_definition(seed):
    rng = np.random.default_rng(seed)
    conf = np.concatenate([rng.random(40), [0.0, 1.0, 1.0]])
    y = (rng.random(43) < conf**2).astype(float)
    found = smooth_ece(conf, y, ends="full")
    width = math.ceil(found * 1024) / 1024
    assert found == pytest.approx(smoothed_by_quadrature(conf, y, width), abs=2e-5)
    assert smoothed_by_quadrature(conf, y, width - 1 / 1024) > width - 1 / 1024


def test_smooth_ece_agrees_with_relplot_which_halves_the_weight_of_0_and_1():
    assert smooth_ece(CONF, Y) == pytest.approx(0.0712474639, abs=1e-3)
    twice = [(c, y) for c, y in zip(CONF, Y, strict=True) for _ in range(1 if c in (0, 1) else 2)]
    assert smooth_ece(*zip(*twice, strict=True), ends="full") == pytest.approx(smooth_ece(CONF, Y), abs=1e-9)


def test_smooth_ece_of_the_fixture(fixture):
    shares = [max(np.bincount(row)) / len(row) for row in fixture["assignments"]]
    known = fixture["expected"]["smECE_relplot103_sem1"]
    assert smooth_ece(shares, fixture["y"]) == pytest.approx(known, abs=1e-3)


def test_brier_and_auroc():
    assert brier(CONF, Y) == pytest.approx(0.1386667, abs=1e-7)
    assert auroc(CONF, Y) == pytest.approx(0.875)
    rng = np.random.default_rng(0)
    conf, y = rng.integers(0, 11, 200) / 10, rng.integers(0, 2, 200)
    assert auroc(conf, y) == pytest.approx(roc_auc_score(y, conf))
    assert math.isnan(auroc([0.2, 0.4], [1, 1]))


def test_classwise_is_the_mean_over_one_against_the_rest():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 50)
    labels = rng.integers(0, 3, 50)
    by_hand = []
    for k in range(3):
        total = 0.0
        for b in range(10):
            inside = (np.minimum(np.floor(p[:, k] * 10), 9)) == b
            if inside.any():
                total += inside.mean() * abs(p[inside, k].mean() - (labels[inside] == k).mean())
        by_hand.append(total)
    assert classwise_ece(p, labels) == pytest.approx(np.mean(by_hand))
    with pytest.raises(ValueError, match="labels"):
        classwise_ece(p, labels + 1)


def test_the_noise_floor_is_what_calibrated_grades_give():
    rng = np.random.default_rng(1)
    conf = rng.random(400)
    drawn = [ece(conf, rng.random(400) < conf) for _ in range(200)]
    assert noise_floor(conf) == pytest.approx(np.mean(drawn), rel=0.05)
    assert noise_floor(np.ones(10)) == 0.0


def test_nothing_gives_nan_and_nonsense_is_refused():
    assert math.isnan(noise_floor([]))
    assert all(math.isnan(f([], [])) for f in (ece, debiased_ece, smooth_ece, brier, auroc))
    assert smooth_ece([0.5, 0.5], [0.5, 0.5]) == 0.0
    for wrong, y in (([1.5], [1]), ([0.5], [2]), ([float("nan")], [1]), ([0.5, 0.5], [1])):
        with pytest.raises(ValueError, match="confidences"):
            ece(wrong, y)
    with pytest.raises(ValueError, match="0 or 1"):
        auroc([0.5], [0.5])
    with pytest.raises(ValueError, match="at least one bin"):
        ece([0.5], [1], bins=0)
    with pytest.raises(ValueError, match="edges"):
        ece([0.5], [1], edges="right")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ece([0.5], [1], bins=2.5), "at least one bin"),
        (lambda: noise_floor([1.5]), "confidences"),
        (lambda: noise_floor([math.nan]), "confidences"),
        (lambda: noise_floor([0.5], reps=0), "at least one draw"),
        (lambda: smooth_ece([0.5], [1], ends="none"), "half"),
        (lambda: classwise_ece([[0.5, 0.5]], [0.5]), "labels"),
        (lambda: classwise_ece([[0.5, 0.4]], [0]), "adds up to 1"),
        (lambda: classwise_ece([[math.nan, 0.5]], [0]), "adds up to 1"),
    ],
)
def test_what_a_measure_does_not_mean_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
