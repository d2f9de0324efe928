"""Averages against closed forms: the oracles of papers/adversarial.md, sections 5 and 9."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from poise.robust.training.averaging import (
    MoreauEnvelope,
    WeightAverage,
    assign,
    update_bn,
)


class _Weight(nn.Module):
    """One vector of weights."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def _follow(average: WeightAverage | MoreauEnvelope, iterates: list[float], first: float = 0.0) -> list[float]:
    """u before the first step and after each, for a weight that takes these values."""
    model = _Weight(first)
    state = average.initial(model)
    seen = [state["w"].item()]
    for step, value in enumerate(iterates, start=1):
        nn.init.constant_(model.w, value)
        state = average.after(model, state, step)
        seen.append(state["w"].item())
    return seen


def _step_of_me(u: float, p: float, a: float) -> float:
    """One outer step for R(w) = (w - 3)^2 / 2, whose inner problem w* = (3 + p u) / (1 + p) is solved exactly."""
    model, algorithm = _Weight(u), MoreauEnvelope(p, WeightAverage("const", rate=a * p))
    state = algorithm.after(model, algorithm.initial(model), 0)
    nn.init.constant_(model.w, (3 + p * u) / (1 + p))
    pull = algorithm.proximal_term(model, state, 0)
    ((model.w - 3).square().sum() / 2 + pull).backward()
    assert model.w.grad.abs().item() < 1e-6 * (1 + p)  # w* is where the gradient of R + pull vanishes
    return algorithm.after(model, state, 1)["w"].item()


def test_me_a_on_a_parabola() -> None:
    """p = 2, a = 1/4 from u = 0: .5, .916667, in general 3 (1 - (1 - a p / (1 + p))^t)."""
    u, seen = 0.0, []
    for _ in range(5):
        u = _step_of_me(u, 2, 0.25)
        seen.append(u)
    assert seen[:2] == pytest.approx([0.5, 0.916667], abs=1e-6)
    assert seen == pytest.approx([3 * (1 - (1 - 0.5 / 3) ** t) for t in range(1, 6)])


def test_for_a_stiff_pull_an_outer_step_is_a_gradient_step_on_the_risk() -> None:
    assert _step_of_me(1.0, 1e9, 0.1) == pytest.approx(1.0 - 0.1 * (1.0 - 3), abs=1e-6)


@pytest.mark.parametrize("u", [-2.0, 0.9, 1.2, 5.0])
def test_the_envelope_of_the_absolute_value_is_hubers(u: float) -> None:
    """R = |w - 1|: brute force over w gives prox = 1 + soft(u - 1, 1/p), M Huber's, its gradient clip(p (u - 1))."""
    p, algorithm = 2.0, MoreauEnvelope(2.0)
    grid = torch.linspace(-4, 6, 100_001, dtype=torch.float64)
    anchor = algorithm.initial(_Weight(u))
    model = _Weight(0.0)
    pulls = []
    for w in (grid[0], grid[-1], grid[77]):  # the pull is what the vectorised formula below says
        nn.init.constant_(model.w, w.item())
        pulls.append(algorithm.proximal_term(model, anchor, 0).item() - (p / 2 * (w - u) ** 2).item())
    assert pulls == pytest.approx([0, 0, 0], abs=1e-9)
    energy = (grid - 1).abs() + p / 2 * (grid - u) ** 2
    prox, envelope = grid[energy.argmin()].item(), energy.min().item()
    far = abs(u - 1) > 1 / p
    assert prox == pytest.approx(1 + math.copysign(max(abs(u - 1) - 1 / p, 0), u - 1), abs=2e-4)
    assert envelope == pytest.approx(abs(u - 1) - 1 / (2 * p) if far else p / 2 * (u - 1) ** 2, abs=1e-6)
    assert p * (u - prox) == pytest.approx(min(max(p * (u - 1), -1), 1), abs=1e-3)


def test_without_a_pull_and_with_equal_moves_me_a_is_swa_bit_for_bit() -> None:
    """And both are the mean of the iterates behind the start, whatever came before."""
    iterates = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    average = WeightAverage("swa", start=4, every=3)
    envelope = MoreauEnvelope(0.0, average)
    swa = _follow(average, iterates)
    assert swa == _follow(envelope, iterates)
    assert envelope.proximal_term(_Weight(1.0), envelope.initial(_Weight(0.0)), 10) is None
    taken = [iterates[step - 1] for step in (7, 10, 13, 16, 19)]
    for index, step in enumerate((7, 10, 13, 16, 19), start=1):
        assert swa[step] == pytest.approx(sum(taken[:index]) / index)
        assert swa[min(step + 1, 20)] == swa[step]
    assert swa[7] == iterates[6]  # the first move overwrites
    assert swa[4:7] == [iterates[3]] * 3  # the anchor is where the start was


def test_ema_warms_up() -> None:
    iterates = [1.0, -2.0, 4.0, 0.5]
    expected, u = [3.0], 3.0
    for t, w in enumerate(iterates, start=1):
        decay = min(0.3, (1 + t) / (10 + t))
        u = decay * u + (1 - decay) * w
        expected.append(u)
    assert _follow(WeightAverage("ema", decay=0.3), iterates, 3.0) == pytest.approx(expected)
    plain = _follow(WeightAverage("ema", decay=0.3, warm_up=False), iterates, 3.0)
    assert plain[:3] == pytest.approx([3.0, 1.6, 0.3 * 1.6 - 0.7 * 2])


@pytest.mark.parametrize(
    "average",
    [
        WeightAverage("swa", start=2, every=3),
        WeightAverage("ema", start=1),
        WeightAverage("ema", decay=0.7, warm_up=False),
        WeightAverage("const", rate=0.3, every=2),
    ],
)
def test_every_move_is_that_of_the_formula_bit_for_bit(average: WeightAverage) -> None:
    """u <- u + b_t (w - u) as torch.lerp rounds it, in float32 and on weights in either memory layout."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 11)).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    state = average.initial(model)
    expected = {name: value.clone() for name, value in state.items()}
    for step in range(1, 20):
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=generator)
        state = average.after(model, state, step)
        t = average.moves(step)
        if step >= average.start and (step - average.start) % average.every == 0:
            decay = min(average.decay, (1 + t) / (10 + t)) if average.warm_up else average.decay
            size = {"swa": 1 / max(t, 1), "ema": 1 - decay, "const": average.rate}[average.rule] if t else 1.0
            for name, parameter in model.named_parameters():
                expected[name] = torch.lerp(expected[name], parameter.detach(), size)
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_before_the_start_nothing_pulls_and_frozen_weights_are_not_averaged() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    algorithm = MoreauEnvelope(0.5, WeightAverage(start=3))
    state = algorithm.initial(model)
    assert list(state) == ["1.weight", "1.bias"]
    assert algorithm.proximal_term(model, state, 2) is None
    nn.init.zeros_(model[1].weight)
    pull = algorithm.proximal_term(model, state, 3)
    assert pull.item() == pytest.approx(0.25 * state["1.weight"].square().sum().item())
    with pytest.raises(ValueError, match="not averages of this model"):
        assign(model, {"0.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="every at least 1"):
        WeightAverage(every=0)


def test_a_state_is_never_written_into() -> None:
    model, average = _Weight(1.0), WeightAverage("ema")
    state = average.initial(model)
    kept = state["w"].clone()
    nn.init.constant_(model.w, 5.0)
    after = average.after(model, state, 1)
    assert torch.equal(state["w"], kept)
    assert not torch.equal(after["w"], kept)
    nn.init.constant_(model.w, 7.0)
    assert after["w"].item() < 5  # and does not share memory with the weights


def test_a_state_from_a_file_takes_the_memory_layout_of_the_weights() -> None:
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    algorithm = MoreauEnvelope(0.5, WeightAverage("ema"))
    state = algorithm.initial(model)
    read = {name: value.contiguous() for name, value in state.items()}
    assert read["weight"].stride() != model.weight.stride()
    nn.init.normal_(model.weight)
    assert torch.equal(algorithm.proximal_term(model, read, 1), algorithm.proximal_term(model, state, 1))
    after, again = (algorithm.after(model, each, 1)["weight"] for each in (state, read))
    assert torch.equal(after, again)
    assert after.stride() == again.stride() == model.weight.stride()
    assert not again.requires_grad


def _population_loss(w: Tensor) -> float:
    """E ||w - x||_1 for x ~ N(0, I): a sum of means of folded normals; 10 sqrt(2 / pi) = 7.97885 at w = 0, d = 10."""
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    density = torch.exp(-w.square() / 2) * math.sqrt(2 / math.pi)
    return (density + w * (2 * normal.cdf(w) - 1)).sum().item()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_on_the_toy_task_the_anchor_is_nearer_to_the_optimum_than_the_iterate(p: float) -> None:
    """Loss ||w - x||_1, x ~ N(0, I_10), 200 examples, batch 1, lr .01, momentum .9, an outer step per epoch."""
    assert _population_loss(torch.zeros(10)) == pytest.approx(7.97885, abs=1e-5)
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(200, 10, generator=generator)
    order = torch.cat([torch.randperm(200, generator=generator) for _ in range(12)])
    model = _Weight(*[2.0] * 10).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    algorithm = MoreauEnvelope(p, WeightAverage("swa", start=400, every=200))
    state, iterates = algorithm.initial(model), []
    for step, index in enumerate(order):
        optimizer.zero_grad()
        loss, pull = (model.w - data[index]).abs().sum(), algorithm.proximal_term(model, state, step)
        (loss if pull is None else loss + pull).backward()
        optimizer.step()
        state = algorithm.after(model, state, step + 1)
        if (step + 1) % 200 == 0 and step > 400:
            iterates.append(_population_loss(model.w.detach()))
    averaged = _population_loss(state["w"])
    assert 7.97885 < averaged < min(7.97885 + 0.15, sum(iterates) / len(iterates))


def test_statistics_are_measured_anew_and_exactly() -> None:
    """A linear layer before batch norm, in float64: the buffers are those of W x + b over all the data, and with one
    batch the variance is too; with several it is the mean of theirs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)).double().train()
    model[1].running_mean.fill_(100)
    model[3].eval()
    x = torch.randn(60, 4, dtype=torch.float64)
    hidden = model[0](x).detach()
    rng, weights = torch.get_rng_state(), copy.deepcopy(list(model.parameters()))
    update_bn(model, [x])
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[1].running_var, hidden.var(0))
    update_bn(model, iter(x.split(20)))
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden.split(20)]).mean(0))
    assert [m.training for m in model] == [True, True, True, False]
    assert model[1].momentum == 0.1
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="at least one batch"):
        update_bn(model, [])
    update_bn(model[3], [])  # nothing to measure


def test_assigned_averages_are_the_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {name: torch.rand_like(value) for name, value in WeightAverage().initial(model).items()}
    assign(model, state)
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())
