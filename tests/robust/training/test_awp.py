"""Adversarial weight perturbation: its lengths, what it leaves behind, and the method without it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from poise.robust.attacks import perturb
from poise.robust.objectives import Objective, ObjectiveContext, ObjectiveOutput, Points
from poise.robust.objectives.at import At
from poise.robust.objectives.max import Max
from poise.robust.objectives.msd import Msd
from poise.robust.threats import Threat
from poise.robust.training.awp import WeightPerturbation, direction

GAMMA = 0.02


def _attacks(*norms: str) -> dict[str, Callable[..., Tensor]]:
    eps = {"linf": 0.1, "l2": 0.5}
    return {norm: partial(perturb, threat=Threat(norm, eps[norm]), steps=2) for norm in norms}


def _copy(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def _output(
    awp: WeightPerturbation, objective: Objective, model: nn.Module, x: Tensor, y: Tensor, attacks: Any, **more: Any
) -> ObjectiveOutput:
    context = ObjectiveContext(model, x, y, attacks, **more)
    awp.reset()
    return awp.loss(objective, objective.craft(context), context)


@pytest.fixture
def net(small_net: nn.Module) -> nn.Module:
    small_net[3].p = 0.0
    return small_net


def test_every_matrix_moves_by_gamma_times_its_norm_along_the_gradient_at_the_adversarial_examples(net, images):
    before, plain = _copy(net), copy.deepcopy(net)
    awp = WeightPerturbation(net, GAMMA)
    _output(awp, At(), net, *images, _attacks("linf"))
    point = _attacks("linf")["linf"](plain, *images)
    nn.functional.cross_entropy(plain(point), images[1]).backward()
    for now, then, parameter in zip(net.parameters(), before, plain.parameters(), strict=True):
        moved = now.detach() - then
        if then.ndim == 1:
            assert torch.equal(now, then)
        else:
            assert moved.norm().item() == pytest.approx(GAMMA * then.norm().item(), rel=1e-4)
            assert nn.functional.cosine_similarity(moved.flatten(), parameter.grad.flatten(), 0).item() > 0.9999


def test_the_direction_does_not_hang_on_the_length_of_the_gradient_and_is_zero_without_one():
    weights = [torch.randn(3, 4), torch.randn(5, 2)]
    gradients = [torch.randn(3, 4), torch.zeros(5, 2)]
    v = direction(weights, gradients, GAMMA)
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(direction(weights, [scale * d for d in gradients], GAMMA), v)
    assert torch.equal(v[1], torch.zeros(5, 2))


def test_the_loss_is_that_of_the_perturbed_weights_at_points_crafted_once_before(net, images):
    calls, plain = [], copy.deepcopy(net)

    def counted(model: nn.Module, x: Tensor, y: Tensor, *, loss=None) -> Tensor:
        calls.append(_copy(model))
        return x + 0.05 * (len(calls) % 2)

    awp = WeightPerturbation(net, GAMMA)
    before = _copy(net)
    out = _output(awp, Max(), net, *images, {"linf": counted, "l2": counted})
    assert len(calls) == 2
    assert all(torch.equal(a, b) for seen in calls for a, b in zip(seen, before, strict=True))
    for parameter, value in zip(plain.parameters(), _copy(net), strict=True):
        parameter.data.copy_(value)
    x, y = images
    losses = [nn.functional.cross_entropy(plain(point), y, reduction="none") for point in (x + 0.05, x)]
    assert torch.equal(out.loss, torch.stack(losses).amax(0).mean())
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), plain.buffers(), strict=True))  # two forwards, at w'


class _Counted(Msd):
    """MSD that remembers the points that it has crafted."""

    crafted: ClassVar[list[Tensor]] = []

    def craft(self, context: ObjectiveContext) -> Points:
        points = super().craft(context)
        self.crafted.append(points["msd"])
        return points


def test_an_attack_on_several_threats_at_once_is_crafted_once_too(net, images):
    attacks = {norm: _Ball(Threat(norm, eps)) for norm, eps in (("linf", 0.1), ("l2", 0.5))}
    objective = _Counted(steps=2)
    out = _output(WeightPerturbation(net, GAMMA), objective, net, *images, attacks)
    (crafted,) = objective.crafted
    net.train()
    assert torch.equal(out.loss, nn.functional.cross_entropy(net(crafted), images[1], reduction="none").mean())


class _Ball:
    def __init__(self, threat: Threat) -> None:
        self.threat = threat


def test_without_a_step_the_weights_come_back_bit_for_bit_and_with_one_they_move_by_its_difference(net, images):
    awp, before = WeightPerturbation(net, GAMMA), _copy(net)
    _output(awp, At(), net, *images, _attacks("linf"))
    awp.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, _copy(net), strict=True))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    _output(awp, At(), net, *images, _attacks("linf")).loss.backward()
    perturbed = _copy(net)
    optimizer.step()
    stepped = _copy(net)
    awp.restore()
    for now, w, w1, w2 in zip(net.parameters(), before, perturbed, stepped, strict=True):
        assert torch.equal(now, w + (w2 - w1) if w.ndim > 1 else w2)
    after = _copy(net)
    awp.restore()  # nothing is left to restore
    assert all(torch.equal(a, b) for a, b in zip(after, _copy(net), strict=True))


def test_of_several_batches_in_a_step_each_starts_from_the_unperturbed_weights(net, images):
    awp, before = WeightPerturbation(net, GAMMA), _copy(net)
    for rows in (slice(0, 6), slice(6, 12)):
        _output(awp, At(), net, images[0][rows], images[1][rows], _attacks("linf"))
        for now, then in zip(net.parameters(), before, strict=True):
            assert (now.detach() - then).norm().item() <= 1.001 * GAMMA * then.norm().item()
    awp.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, _copy(net), strict=True))


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": GAMMA, "start": 3}])
def test_gamma_zero_and_steps_before_the_start_are_the_method_itself(net, images, options):
    results = []
    for wrapped in (False, True):
        model = copy.deepcopy(net)
        awp = WeightPerturbation(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        context = ObjectiveContext(model, *images, _attacks("linf", "l2"), step=2)
        points = Max().craft(context)
        output = awp.loss(Max(), points, context) if wrapped else Max().loss(points, context)
        output.loss.backward()
        optimizer.step()
        awp.restore()
        results.append([*model.parameters(), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_perturbation_begins_with_its_first_step(net, images):
    awp, before = WeightPerturbation(net, GAMMA, start=3), _copy(net)
    _output(awp, At(), net, *images, _attacks("linf"), step=3)
    assert any(not torch.equal(now, then) for now, then in zip(_copy(net), before, strict=True))


def test_the_ascent_direction_is_the_mean_over_ranks(net, images):
    """Whatever this rank found, the direction is what `mean` returns: here the weights themselves, so w' = (1+g) w."""
    matrices = [p.detach().clone() for p in net.parameters() if p.ndim > 1]
    everywhere = torch.cat([matrix.flatten() for matrix in matrices])
    awp = WeightPerturbation(net, GAMMA)
    _output(awp, At(), net, *images, _attacks("linf"), mean=lambda _: everywhere)
    for now, then in zip([p for p in net.parameters() if p.ndim > 1], matrices, strict=True):
        torch.testing.assert_close(now.detach(), (1 + GAMMA) * then)


def test_under_autocast_the_second_forward_sees_the_perturbed_weights(net, images):
    awp = WeightPerturbation(net, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = _output(awp, At(), net, *images, {"linf": lambda model, x, y, **options: x})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(out.loss, nn.functional.cross_entropy(net(images[0]), images[1]))


def test_a_negative_gamma_is_refused(net):
    with pytest.raises(ValueError, match="at least 0"):
        WeightPerturbation(net, -1)
