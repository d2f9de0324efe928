"""Noise per example: uniform, repeatable, free of the batch, other under another label."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from poise.robust.noise import Noise, as_noise


def test_the_numbers_of_an_example_do_not_hang_on_its_batch() -> None:
    noise = Noise.of(3, "a", range(50))
    whole = noise.fold_in(7).uniform(9)
    rows = torch.tensor([4, 40, 11])
    assert torch.equal(noise.select(rows).fold_in(7).uniform(9), whole[rows])
    assert torch.equal(Noise.of(3, "a", [40]).fold_in(7).uniform(9), whole[40:41])
    assert torch.equal(noise.fold_in(7).uniform(5), whole[:, :5])


@pytest.mark.parametrize(
    "other", [Noise.of(4, "a", range(9)), Noise.of(3, "b", range(9)), Noise.of(3, "a", range(9)).fold_in(0)]
)
def test_seed_name_and_label_each_make_another_stream(other: Noise) -> None:
    assert not (Noise.of(3, "a", range(9)).uniform(40) == other.uniform(40)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_and_normal_have_their_distributions_along_and_across_examples(dtype: torch.dtype) -> None:
    noise = Noise.of(0, "x", range(400))
    uniform, normal = noise.uniform(500, dtype), noise.fold_in(1).normal(500, dtype)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    assert uniform.mean(0).sub(0.5).abs().max() < 5 * (1 / 12 / 400) ** 0.5
    assert uniform.mean(1).sub(0.5).abs().max() < 5 * (1 / 12 / 500) ** 0.5
    assert torch.corrcoef(uniform[:40]).fill_diagonal_(0).abs().max() < 0.25


def test_integers_reach_every_value_between_their_bounds() -> None:
    drawn = Noise.of(0, "x", range(30)).integers(2, torch.tensor([[5]]).expand(30, 1), 40)
    assert drawn.unique().tolist() == [2, 3, 4]


def test_a_generator_draws_the_keys_and_nothing_else_is_touched() -> None:
    x, before = torch.zeros(5, 2), torch.get_rng_state()
    one, two = (as_noise(torch.Generator().manual_seed(seed), x).uniform(4) for seed in (0, 1))
    assert torch.equal(one, as_noise(None, x).uniform(4))
    assert not torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())
