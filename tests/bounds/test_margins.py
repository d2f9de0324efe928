"""Margins, the grid that pays for choosing one, and data radii against brute force over corners."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from poise.bounds.margins import clean_margins, data_radius, margin_percentile, on_grid
from poise.robust.threats import Threat


def test_margins_by_hand_and_as_brute_force():
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 4.5]])
    assert clean_margins(logits, torch.tensor([0, 1])).tolist() == [0.5, -0.5]
    logits, y = torch.randn(50, 7), torch.randint(0, 7, (50,))
    expected = [(row[k] - max(v for j, v in enumerate(row) if j != k)).item() for row, k in zip(logits, y, strict=True)]
    assert clean_margins(logits, y).tolist() == pytest.approx(expected)


def test_a_percentile_that_is_not_above_zero_is_undefined():
    margins = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert margin_percentile(margins, 75, "all") == 2
    assert margin_percentile(margins, 62.5, "all") == 1.5
    assert math.isnan(margin_percentile(margins, 25, "all"))
    assert math.isnan(margin_percentile(margins, 1, "all"))
    assert margin_percentile(margins, 50) == 2
    assert margin_percentile(margins, 1) == pytest.approx(1.02)
    assert math.isnan(margin_percentile(-margins[2:], 50))


@pytest.mark.parametrize("margin", [0.3, 1.0, 1.999, 2.0, 37.0, 1e-4])
def test_the_grid_is_below_the_margin_and_within_a_factor_of_two(margin):
    snapped, share = on_grid(margin)
    assert snapped <= margin < 2 * snapped
    assert 0 < share <= 0.5


def test_the_shares_of_delta_are_distinct_and_sum_to_one():
    shares = [on_grid(2.0**j)[1] for j in range(-200, 201)]
    assert len(set(shares)) == 401
    assert sum(shares) == pytest.approx(1 - 1 / 402)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("shift", [0.0, 0.45])
def test_every_radius_holds_for_what_the_adversary_can_reach_and_each_is_tighter(norm, shift):
    generator = torch.Generator().manual_seed(0)
    x, threat = torch.rand(20, 1, 3, 3, generator=generator), Threat(norm, 0.4)
    reached = 0.0
    for _ in range(300):
        start = threat.random_start(x, generator)
        outward = threat.project(x, start + (x + start - shift) * 5)
        reached = max(reached, (x + outward - shift).flatten(1).norm(dim=1).max().item())
    paper, l2, box = (data_radius(x, threat, how, shift=shift) for how in ("paper", "l2", "box"))
    assert 0 < reached <= box * (1 + 1e-6)
    assert box <= l2 <= paper


def test_the_box_radius_is_the_farthest_corner():
    x, eps, shift = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(1)), 0.3, 0.5
    corners = [torch.tensor(c).view(1, 1, 2, 2) * eps for c in itertools.product((-1.0, 1.0), repeat=4)]
    expected = max(((x + c).clamp(0, 1) - shift).flatten(1).norm(dim=1).max().item() for c in corners)
    assert data_radius(x, Threat("linf", eps), "box", shift=shift) == pytest.approx(expected)


def test_the_official_factor_of_cifar_images():
    x = torch.ones(1, 3, 32, 32)
    threat = Threat("linf", 8 / 255)
    assert data_radius(x, threat, "paper") == pytest.approx(57.16, abs=0.01)
    assert data_radius(x, threat, "l2") - data_radius(x, Threat("linf", 0), "l2") == pytest.approx(1.739, abs=1e-3)
    assert data_radius(x, threat, "box") == pytest.approx(55.43, abs=0.01)


def test_no_adversary_is_the_clean_radius():
    x = torch.rand(5, 2, 3, 3)
    expected = x.double().flatten(1).norm(dim=1).max().item()
    for norm in ("linf", "l2", "l1"):
        assert data_radius(x, Threat(norm, 0), "box") == pytest.approx(expected, rel=1e-12)
        assert data_radius(x, Threat(norm, 0), "l2") == pytest.approx(expected, rel=1e-12)
    assert data_radius(x, Threat("l2", 0), "paper") == pytest.approx(expected, rel=1e-12)
