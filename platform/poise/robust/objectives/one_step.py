"""What FGSM-RS and GradAlign share: their one-step attack, and the cosine between input gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.robust.attacks.losses import log_odds
from poise.robust.spec import Threats

__all__ = ["check_one_step", "gradient_cosines"]


def check_one_step(name: str, threats: Threats) -> None:
    """Raise `ValueError` for a threat with an attack of its own: the objective of this name takes one step of PGD."""
    for norm, threat in threats.items():
        if threat.attack == "apgd":
            raise ValueError(f"`{name}` trains with one step of its own: remove threats.{norm}.attack")


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
