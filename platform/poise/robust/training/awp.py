"""Adversarial weight perturbation, around any objective (Wu et al., 2020; papers/adversarial.md, section 6).

One optimizer step, for weights w:

    craft x' at w;  d = grad_w L(w, x'), averaged over ranks;  v = gamma ||w||_F d / ||d||_F for each matrix of w
    w' = w + v;  backward of L(w', x');  the optimizer takes w' to w'';  w <- w + (w'' - w')

Momentum, weight decay and batch-norm buffers see w', as in the authors' code. Their `w'' - v` does not restore w bit
for bit where the optimizer changed nothing. Here the difference that the optimizer made is added to a saved copy of w,
which does. Tensors of one dimension (biases, gains) are not perturbed. With gamma 0 nothing is done at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from poise.robust.attacks import Loss, cross_entropy
from poise.robust.objectives import Attack, Objective, ObjectiveInput, ObjectiveOutput
from poise.robust.threats import Threat

__all__ = ["WeightPerturbation", "direction"]


class WeightPerturbation:
    """Moves the weights of `model` to w' and back: `objective` perturbs them, `restore` ends the step."""

    def __init__(self, model: nn.Module, gamma: float) -> None:
        if gamma < 0:
            raise ValueError(f"gamma is at least 0, not {gamma}")
        self._model = model
        self._gamma = gamma
        self._weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        self._saved: list[Tensor] = []  # w; empty while the weights are not perturbed
        self._perturbed: list[Tensor] = []  # w'

    def objective(
        self, objective: Objective, model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput
    ) -> ObjectiveOutput:
        """`objective` at w', with the adversarial examples of w; `model` is the perturbed one, maybe wrapped in DDP.

        In a step of several batches, each batch perturbs the weights by itself, from w.
        """
        if self._gamma == 0:
            return objective(model, x, y, inputs)
        self._reset()
        recording = _Recording()
        recorded_inputs = _record(inputs, recording)
        # the first call crafts the adversarial examples at w, the second gets the same examples at w'
        self._perturb(self._perturbation(objective, x, y, recorded_inputs))
        recording.rewind()
        return objective(model, x, y, recorded_inputs)

    @torch.no_grad()
    def restore(self) -> None:
        """After the optimizer's step: w plus the difference that the optimizer made."""
        if self._saved:
            difference = torch._foreach_sub(self._weights, self._perturbed)
            self._reset()
            torch._foreach_add_(self._weights, difference)

    def _perturbation(self, objective: Objective, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> list[Tensor]:
        """v, from a forward that leaves the buffers as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        output = objective(self._model, x, y, inputs)
        gradients = torch.autograd.grad(output.loss, self._weights, materialize_grads=True)
        for buffer, saved in buffers:
            buffer.copy_(saved)
        # one flat tensor, so that ranks average all gradients in a single call
        flat = inputs.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(flat, [weight.numel() for weight in self._weights])
        shaped = [part.view_as(weight) for part, weight in zip(parts, self._weights, strict=True)]
        return direction(self._weights, shaped, self._gamma)

    @torch.no_grad()
    def _perturb(self, v: list[Tensor]) -> None:
        self._saved = [weight.clone() for weight in self._weights]
        torch._foreach_add_(self._weights, v)
        self._perturbed = [weight.clone() for weight in self._weights]
        torch.clear_autocast_cache()  # it may hold w in bf16

    @torch.no_grad()
    def _reset(self) -> None:
        """Set the weights to w exactly, if they are perturbed."""
        if self._saved:
            torch._foreach_copy_(self._weights, self._saved)
            self._saved = []
            self._perturbed = []


def direction(weights: Sequence[Tensor], gradients: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """v = gamma ||w||_F d / ||d||_F for each weight w and its gradient d; 0 where d is 0."""
    with torch.no_grad():
        lengths = [torch.linalg.vector_norm(d).clamp(min=1e-30) for d in gradients]
        sizes = [gamma * torch.linalg.vector_norm(w) for w in weights]
        return [size * (d / length) for size, d, length in zip(sizes, gradients, lengths, strict=True)]


class _Recording:
    """The results of the attacks in the order of their calls; after `rewind` they are returned again, not computed."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []
        self.position: int | None = None  # None while recording

    def rewind(self) -> None:
        self.position = 0

    def result(self, attack: Callable[[], Tensor]) -> Tensor:
        if self.position is None:
            self.points.append(attack())
            return self.points[-1]
        self.position += 1
        return self.points[self.position - 1]


@dataclass(frozen=True)
class _RecordedAttack:
    """An attack that is recorded at its first call, and replayed once the recording is rewound."""

    attack: Attack
    recording: _Recording

    @property
    def threat(self) -> Threat:
        return self.attack.threat

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy, **options: Any) -> Tensor:
        return self.recording.result(lambda: self.attack(model, x, y, loss=loss, **options))


def _record(inputs: ObjectiveInput, recording: _Recording) -> ObjectiveInput:
    """The same input, with every way to attack replaced by one that is recorded."""
    attacks = {norm: _RecordedAttack(attack, recording) for norm, attack in inputs.attacks.items()}
    run_attack = inputs.run_attack
    fused = inputs.fused

    def recorded_run_attack(attack: Callable[[], Tensor]) -> Tensor:
        return recording.result(lambda: run_attack(attack))

    def recorded_fused(model: nn.Module, x: Tensor, y: Tensor) -> Sequence[Tensor]:
        assert fused is not None
        points = recording.result(lambda: torch.stack([*fused(model, x, y)]))  # (P, N, ...)
        return points.unbind()

    return replace(
        inputs,
        attacks=attacks,
        run_attack=recorded_run_attack,
        fused=None if fused is None else recorded_fused,
    )
