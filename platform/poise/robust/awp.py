"""Adversarial weight perturbation, round any objective (Wu et al., 2020; papers/adversarial.md, section 6).

One optimizer step, for weights w:

    craft x' at w;  d = grad_w L(w, x'), averaged over ranks;  v = gamma ||w||_F d / ||d||_F for each matrix of w
    w' = w + v;  backward of L(w', x');  the optimizer takes w' to w'';  w <- w + (w'' - w')

Momentum, weight decay and batch-norm buffers see w', as in the authors' code. Its `w'' - v` does not restore w bit for
bit where nothing moved; here the difference that the optimizer made is added to a saved copy of w, which does. Tensors
of one dimension (biases, gains) are not perturbed, and with gamma 0 nothing is done at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from poise.robust.attacks import Loss, cross_entropy
from poise.robust.objectives import Attack, Objective, Outcome, Play
from poise.robust.threats import Threat

__all__ = ["WeightPerturbation", "direction"]


class WeightPerturbation:
    """The weights of `model` on their way to w' and back: `objective` perturbs them, `restore` ends the step."""

    def __init__(self, model: nn.Module, gamma: float) -> None:
        if gamma < 0:
            raise ValueError(f"gamma is at least 0, not {gamma}")
        self._model, self._gamma = model, gamma
        self._weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        self._saved: list[Tensor] = []
        self._perturbed: list[Tensor] = []

    def objective(self, objective: Objective, model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
        """`objective` at w', with the adversarial examples of w; `model` is the perturbed one, maybe wrapped in DDP.

        Of a step of several batches each is perturbed by itself, from w.
        """
        if self._gamma == 0:
            return objective(model, x, y, play)
        self._back()
        tape = _Tape()
        attacks = {norm: _Taped(attack, tape) for norm, attack in play.attacks.items()}
        craft, together = play.craft, play.together
        play = replace(play, attacks=attacks, craft=lambda attack: tape.point(lambda: craft(attack)))
        if together is not None:
            play = replace(play, together=lambda *given: tape.point(lambda: torch.stack([*together(*given)])).unbind())
        self._perturb(self._ascent(objective, x, y, play))
        tape.rewind()
        return objective(model, x, y, play)

    @torch.no_grad()
    def restore(self) -> None:
        """After the optimizer's step: w plus the difference that the optimizer made."""
        if self._saved:
            moved = torch._foreach_sub(self._weights, self._perturbed)
            self._back()
            torch._foreach_add_(self._weights, moved)

    def _ascent(self, objective: Objective, x: Tensor, y: Tensor, play: Play) -> list[Tensor]:
        """v, from a forward that leaves the buffers as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        outcome = objective(self._model, x, y, play)
        gradients = torch.autograd.grad(outcome.loss, self._weights, materialize_grads=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        flat = play.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(flat, [weight.numel() for weight in self._weights])
        return direction(self._weights, [p.view_as(w) for p, w in zip(parts, self._weights, strict=True)], self._gamma)

    @torch.no_grad()
    def _perturb(self, v: list[Tensor]) -> None:
        self._saved = [weight.clone() for weight in self._weights]
        torch._foreach_add_(self._weights, v)
        self._perturbed = [weight.clone() for weight in self._weights]
        torch.clear_autocast_cache()  # it may hold w in bf16

    @torch.no_grad()
    def _back(self) -> None:
        """Exactly w again, if it is not."""
        if self._saved:
            torch._foreach_copy_(self._weights, self._saved)
            self._saved, self._perturbed = [], []


def direction(weights: Sequence[Tensor], gradients: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """v = gamma ||w||_F d / ||d||_F for each weight w and its gradient d; 0 where d is 0."""
    with torch.no_grad():
        lengths = [torch.linalg.vector_norm(d).clamp(min=1e-30) for d in gradients]
        sizes = [gamma * torch.linalg.vector_norm(w) for w in weights]
        return [size * (d / length) for size, d, length in zip(sizes, gradients, lengths, strict=True)]


class _Tape:
    """What the attacks found, in the order in which they were called."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []
        self.place: int | None = None

    def rewind(self) -> None:
        self.place = 0

    def point(self, craft: Callable[[], Tensor]) -> Tensor:
        if self.place is None:
            self.points.append(craft())
            return self.points[-1]
        self.place += 1
        return self.points[self.place - 1]


@dataclass(frozen=True)
class _Taped:
    """An attack that plays the tape once it is rewound."""

    attack: Attack
    tape: _Tape

    @property
    def threat(self) -> Threat:
        return self.attack.threat

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy, **options: Any) -> Tensor:
        return self.tape.point(lambda: self.attack(model, x, y, loss=loss, **options))
