"""RAMP's gradient projection by hand, over epochs of a real network, and across interruptions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from poise.robust.objectives import GradientProjection, State
from poise.robust.objectives.projection import fused


def _fused(natural: list[float], adversarial: list[float], beta: float = 0.5) -> list[float]:
    moved: list[float] = fused(torch.zeros(2), torch.tensor(natural), torch.tensor(adversarial), beta).tolist()
    return moved


def test_what_agrees_is_added_and_what_does_not_is_left_out() -> None:
    c = 0.5**0.5  # the cosine of (1, 1) and (1, 0)
    assert _fused([1.0, 0.0], [1.0, 1.0]) == pytest.approx([0.5 + 0.5 * c, 0.5])
    assert _fused([1.0, 0.0], [1.0, 1.0], 0.25) == pytest.approx([0.75 + 0.25 * c, 0.75])
    assert _fused([-1.0, 0.0], [1.0, 1.0]) == [0.5, 0.5]
    assert _fused([0.0, 0.0], [1.0, 1.0]) == [0.5, 0.5]
    assert _fused([3.0, 4.0], [3.0, 4.0]) == pytest.approx([3.0, 4.0])
    assert _fused([1.0, 0.0], [1.0, 1.0], 0.0) == [1.0, 1.0]
    assert fused(torch.tensor(3), torch.tensor(9), torch.tensor(7), 0.5).item() == 7


def test_variances_stay_positive() -> None:
    """Each entry is a convex combination of the three it comes from."""
    three = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0)) + 1e-3
    joined = fused(*three, 0.5)
    assert (joined >= three.amin(0) - 1e-6).all()
    assert (joined <= three.amax(0) + 1e-6).all()


def _step(net: nn.Module, step: int) -> None:
    """An optimizer step that depends on nothing but the model and its number."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.rand(8, 1, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)
    grads = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
    with torch.no_grad():
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            parameter -= 0.1 * grad


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_two_rounds_of_epochs_of_three_steps(small_net: nn.Module) -> None:
    small_net[3].p = 0.0
    projection = GradientProjection(small_net, 0.5, 3)
    state, plain = projection.initial(), copy.deepcopy(small_net)
    assert set(state) == {f"{part}/{name}" for part in ("old", "natural") for name in small_net.state_dict()}
    for step in range(1, 13):
        _step(small_net, step)
        before = {name: value.clone() for name, value in state.items()}
        after = projection(state, step)
        assert all(torch.equal(state[name], before[name]) for name in state)  # the old state is not written to
        assert after.keys() == state.keys()
        state = after
    for epoch in (0, 2):
        old, ends = _copy(plain), []
        for part in (epoch, epoch + 1):
            plain.load_state_dict(old)
            for step in range(3 * part + 1, 3 * part + 4):
                _step(plain, step)
            ends.append(_copy(plain))
        plain.load_state_dict({name: fused(old[name], ends[0][name], ends[1][name], 0.5) for name in old})
        assert any((old[name] != value).any() for name, value in plain.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(_copy(small_net).values(), _copy(plain).values(), strict=True))
    assert small_net[1].num_batches_tracked == 7  # one when it was made, and six adversarial ones


def test_going_on_from_any_step_gives_the_same_bits(small_net: nn.Module) -> None:
    small_net[3].p = 0.0
    start, ends = copy.deepcopy(small_net), list[dict[str, Tensor]]()
    for stop in range(9):
        net = copy.deepcopy(start)
        projection = GradientProjection(net, 0.5, 2)
        state: State = projection.initial()
        for step in range(1, 10):
            _step(net, step)
            state = projection(state, step)
            if step == stop:
                weights, state = _copy(net), {name: value.clone() for name, value in state.items()}
                net = copy.deepcopy(start)
                net.load_state_dict(weights)
                projection = GradientProjection(net, 0.5, 2)
        ends.append(_copy(net) | state)
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0].values(), end.values(), strict=True))
