"""Adversarial training at the price of one step: FGSM-RS and GradAlign. Source: papers/adversarial.md, section 6."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.robust.attacks.losses import log_odds
from poise.robust.noise import as_noise
from poise.robust.objectives.base import ObjectiveInput, ObjectiveOutput
from poise.robust.objectives.norms import single

__all__ = ["fgsm_rs", "gradalign", "gradient_cosines"]


def fgsm_rs(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """CE at the projection of delta + a steepest(grad at x + delta), delta uniform in the ball (Wong et al., 2020).

    a = 1.25 eps. With a linear model and linf, E|delta_i| is 55/64 eps, and 3/4 eps for a = eps.
    """
    ((norm, attack),) = inputs.attacks.items()
    length = float(inputs.options.step) * attack.threat.eps
    return single(model, x, y, inputs, norm, steps=1, step_size=length, restarts=1, random_start=True)


def gradalign(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """CE at FGSM's point (or the threat's own) + lambda (1 - cos(grad_x CE(x), grad_x CE(x + u))).

    u is uniform in the ball (Andriushchenko and Flammarion, 2020). The parameter gradient goes through both input
    gradients. An example whose input gradient is zero at one of the two points has no angle, and is left out of the
    mean.
    """
    ((norm, attack),) = inputs.attacks.items()
    attack_options: dict[str, Any] = {}
    if inputs.options.attack == "fgsm":
        attack_options = {"steps": 1, "step_size": attack.threat.eps, "restarts": 1, "random_start": False}
    output = single(model, x, y, inputs, norm, **attack_options)
    uniform = as_noise(inputs.noise, x).uniform(x[0].numel() + 1, x.dtype)  # (N, d + 1)
    random_point = x + attack.threat.random_start_from(x, uniform)
    cosines, has_angle = gradient_cosines(model, x, random_point, y)  # (N,) each
    count = has_angle.sum()
    misalignment = ((1 - cosines) * has_angle).sum() / count.clamp(min=1)
    loss = output.loss + float(inputs.options.alignment) * misalignment
    metrics = output.metrics | {"gradient_cosine": 1 - misalignment.detach()}
    return ObjectiveOutput(loss, metrics, output.state)


def gradient_cosines(model: nn.Module, x: Tensor, other: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (N,) between the input gradients of CE at two points, with their graph, and where they are defined.

    The second result is bool (N,): False where one of the two gradients is zero.
    """
    first = _input_gradients(model, x, y)  # (N, d)
    second = _input_gradients(model, other, y)  # (N, d)
    has_angle = (first.detach().abs().amax(1) > 0) & (second.detach().abs().amax(1) > 0)
    cosines = nn.functional.cosine_similarity(_scale_by_largest(first), _scale_by_largest(second), dim=1)
    return cosines, has_angle


def _input_gradients(model: nn.Module, point: Tensor, y: Tensor) -> Tensor:
    """Gradients (N, d) of the log odds, with their graph.

    They have the direction of the gradients of the cross entropy, which may underflow.
    """
    point = point.detach().requires_grad_()
    losses = log_odds(model(point.clone()), y)
    (gradient,) = torch.autograd.grad(losses.sum(), point, create_graph=True)
    return gradient.flatten(1)


def _scale_by_largest(gradients: Tensor) -> Tensor:
    """Gradients (N, d), each divided by its largest entry: for a confident example, squares would underflow."""
    largest = gradients.detach().abs().amax(1, keepdim=True)  # (N, 1)
    return gradients / torch.where(largest > 0, largest, 1)
