"""Adversarial training at the price of one step: FGSM-RS and GradAlign. Source: papers/adversarial.md, section 6."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.robust.attacks.losses import log_odds
from poise.robust.noise import as_noise
from poise.robust.objectives.norms import single
from poise.robust.objectives.play import Outcome, Play

__all__ = ["fgsm_rs", "gradalign", "gradient_cosines"]


def fgsm_rs(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """CE at the projection of delta + a steepest(grad at x + delta), delta uniform in the ball (Wong et al., 2020).

    a = 1.25 eps. With a linear model and linf, E|delta_i| is 55/64 eps, and 3/4 eps for a = eps.
    """
    ((norm, attack),) = play.attacks.items()
    length = float(play.options.step) * attack.threat.eps
    return single(model, x, y, play, norm, steps=1, step_size=length, restarts=1, random_start=True)


def gradalign(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """CE at FGSM's point (or the threat's own) + lambda (1 - cos(grad_x CE(x), grad_x CE(x + u))).

    u is uniform in the ball (Andriushchenko and Flammarion, 2020). The gradient goes through both input gradients. An
    example whose input gradient is zero at one of the two points has no angle and is left out of the mean.
    """
    ((norm, attack),) = play.attacks.items()
    fgsm: dict[str, Any] = {"steps": 1, "step_size": attack.threat.eps, "restarts": 1, "random_start": False}
    out = single(model, x, y, play, norm, **(fgsm if play.options.attack == "fgsm" else {}))
    uniform = as_noise(play.noise, x).uniform(x[0].numel() + 1, x.dtype)
    cosines, angled = gradient_cosines(model, x, x + attack.threat.start_from(x, uniform), y)
    count = angled.sum()
    turned = ((1 - cosines) * angled).sum() / count.clamp(min=1)
    loss = out.loss + float(play.options.alignment) * turned
    return Outcome(loss, out.metrics | {"gradient_cosine": 1 - turned.detach()}, out.state)


def gradient_cosines(model: nn.Module, x: Tensor, other: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (N,) between the input gradients of CE at two points, with their graph, and where they are defined."""
    first, second = (_input_gradients(model, point, y) for point in (x, other))
    angled = (first.detach().abs().amax(1) > 0) & (second.detach().abs().amax(1) > 0)
    return nn.functional.cosine_similarity(_scaled(first), _scaled(second), dim=1), angled


def _input_gradients(model: nn.Module, point: Tensor, y: Tensor) -> Tensor:
    point = point.detach().requires_grad_()
    losses = log_odds(model(point.clone()), y)  # the angle is that of the cross entropy, which may underflow
    (gradient,) = torch.autograd.grad(losses.sum(), point, create_graph=True)
    return gradient.flatten(1)


def _scaled(gradients: Tensor) -> Tensor:
    """In units of the largest entry of each: the squares of what a confident example has would underflow."""
    largest = gradients.detach().abs().amax(1, keepdim=True)
    return gradients / torch.where(largest > 0, largest, 1)
