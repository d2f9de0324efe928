"""Alarms against their definition, and the probe on models whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from poise.robust.noise import Noise
from poise.robust.threats import Threat
from poise.robust.training.monitors import (
    Probe,
    alarm,
    probe,
    robust_gap,
)


class _Masked(nn.Module):
    """Around .5 the margin of label 0 falls gently to the right of the image and, behind a ridge, steeply to the left.

    With d the first pixel minus .5 it is 1 - d for d > -.02, and 1.02 - 40 (-.02 - d) below.
    """

    def forward(self, x: Tensor) -> Tensor:
        d = x.flatten(1)[:, 0] - 0.5
        margin = torch.where(d > -0.02, 1 - d, 1.02 - 40 * (-0.02 - d))
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)


def test_an_alarm_is_a_gap_or_a_fall_beyond_the_bound() -> None:
    bounds = {"gap": 0.25, "max_drop": 0.2}
    assert alarm(Probe(0.75, 0.5, 1.0), math.nan, **bounds) is None
    assert "FGSM" in str(alarm(Probe(0.751, 0.5, 1.0), math.nan, **bounds))
    assert alarm(Probe(0.5, 0.5, 1.0), 0.7, **bounds) is None
    assert "fell from 71.0% to 50.0%" in str(alarm(Probe(0.5, 0.5, 1.0), 0.71, **bounds))
    both = str(alarm(Probe(0.9, 0.0, 0.1), 0.5, **bounds))
    assert "90.0% under FGSM and 0.0% under PGD" in both
    assert "fell from 50.0%" in both


def test_the_gap_is_the_difference_measure_by_measure() -> None:
    train, held_out = {"clean": 1.0, "robust/linf": 0.75, "more": 1.0}, {"clean": 0.5, "robust/linf": 0.5}
    assert robust_gap(train, held_out) == {"gap/clean": 0.5, "gap/linf": 0.25}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_linear_model_of_two_classes_has_cosine_one_and_fgsm_is_exact(linear_problem, norm: str) -> None:
    problem = linear_problem(3, 2, (1, 3, 3), 40)
    noise = Noise.of(0, "probe", range(40))
    found = probe(problem.model, problem.x, problem.y, Threat(norm, 0.05), steps=10, noise=noise)
    assert found.cosine == pytest.approx(1, abs=1e-9)
    assert 0 < found.pgd <= found.fgsm <= 1


def test_masked_gradients_are_found_out() -> None:
    """One step from the image goes the gentle way; of random starts the two fifths behind the ridge go the other."""
    x, y = torch.full((200, 1, 2, 2), 0.5), torch.zeros(200, dtype=torch.long)
    found = probe(_Masked(), x, y, Threat("linf", 0.1), steps=10, noise=Noise.of(0, "probe", range(200)))
    assert found.fgsm == 1
    assert found.pgd == pytest.approx(0.6, abs=0.1)
    assert found.cosine == pytest.approx(0.2, abs=0.2)  # three fifths at 1, two at -1
    assert alarm(found, math.nan, gap=0.25, max_drop=0.2)


def test_the_probe_leaves_the_model_as_it_was(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    before = {name: value.clone() for name, value in small_net.state_dict().items()}
    rng = torch.get_rng_state()
    first, second = (
        probe(small_net, *images, Threat("linf", 0.1), steps=2, noise=Noise.of(1, "probe", range(12))) for _ in range(2)
    )
    assert first == second
    assert small_net.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in small_net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in small_net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
