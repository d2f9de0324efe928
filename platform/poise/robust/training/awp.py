"""Adversarial weight perturbation, around any objective (Wu et al., 2020).

One optimizer step, for weights w:

    craft x' at w;  d = grad_w L(w, x'), averaged over ranks;  v = gamma ||w||_F d / ||d||_F for each matrix of w
    w' = w + v;  backward of L(w', x');  the optimizer takes w' to w'';  w <- w + (w'' - w')

Momentum, weight decay and batch-norm buffers see w', as in the authors' code. Their `w'' - v` does not restore w bit
for bit where the optimizer changed nothing. Here the difference that the optimizer made is added to a saved copy of w,
which does. Tensors of one dimension (biases, gains) are not perturbed. With gamma 0, and before the first step of the
perturbation, nothing is done at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from poise.robust.objectives import Objective, ObjectiveContext, ObjectiveOutput, Points
from poise.robust.objectives.checks import compute_loss

__all__ = ["WeightPerturbation", "direction"]


class WeightPerturbation:
    """Wraps the loss of an objective: from the step `start` on, it moves the weights to w' and computes the loss there.

    For each batch, call `reset`, craft the adversarial points, and call `loss`. In a step of several batches, each
    batch perturbs the weights by itself, from w. `restore` ends the step.
    """

    def __init__(self, model: nn.Module, gamma: float, start: int = 0) -> None:
        if gamma < 0:
            raise ValueError(f"gamma is at least 0, not {gamma}")
        self._model = model
        self._gamma = gamma
        self._start = start
        self._weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        self._saved: list[Tensor] = []  # w; empty while the weights are not perturbed
        self._perturbed: list[Tensor] = []  # w'

    @torch.no_grad()
    def reset(self) -> None:
        """Set the weights to w exactly, if they are perturbed."""
        if self._saved:
            torch._foreach_copy_(self._weights, self._saved)
            self._saved = []
            self._perturbed = []

    def loss(self, objective: Objective, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The output of the objective at w', for points that were crafted at w; at w before the step `start`.

        `context.model` is the perturbed model; it may be in a DistributedDataParallel wrapper.
        """
        if self._gamma > 0 and context.step >= self._start:
            self._perturb(self._perturbation(objective, points, context))
        return compute_loss(objective, points, context)

    @torch.no_grad()
    def restore(self) -> None:
        """After the optimizer's step: w plus the difference that the optimizer made."""
        if self._saved:
            difference = torch._foreach_sub(self._weights, self._perturbed)
            self.reset()
            torch._foreach_add_(self._weights, difference)

    def _perturbation(self, objective: Objective, points: Points, context: ObjectiveContext) -> list[Tensor]:
        """v, from a forward of the bare model that leaves the buffers as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        output = compute_loss(objective, points, replace(context, model=self._model))
        gradients = torch.autograd.grad(output.loss, self._weights, materialize_grads=True)
        for buffer, saved in buffers:
            buffer.copy_(saved)
        # one flat tensor, so that ranks average all gradients in a single call
        flat = context.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(flat, [weight.numel() for weight in self._weights])
        shaped = [part.view_as(weight) for part, weight in zip(parts, self._weights, strict=True)]
        return direction(self._weights, shaped, self._gamma)

    @torch.no_grad()
    def _perturb(self, v: list[Tensor]) -> None:
        self._saved = [weight.clone() for weight in self._weights]
        torch._foreach_add_(self._weights, v)
        self._perturbed = [weight.clone() for weight in self._weights]
        torch.clear_autocast_cache()  # it may hold w in bf16


def direction(weights: Sequence[Tensor], gradients: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """v = gamma ||w||_F d / ||d||_F for each weight w and its gradient d; 0 where d is 0."""
    with torch.no_grad():
        lengths = [torch.linalg.vector_norm(d).clamp(min=1e-30) for d in gradients]
        sizes = [gamma * torch.linalg.vector_norm(w) for w in weights]
        return [size * (d / length) for size, d, length in zip(sizes, gradients, lengths, strict=True)]
