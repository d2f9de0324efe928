"""Perturbations that stay in the eigenspaces of the data (on the manifold), or leave them at right angles (off it).

For an orthonormal basis B (r, d) a perturbation delta = B^T c has ||delta||_2 = ||c||_2, and the steepest ascent in the
coefficients c is, seen in pixels, ascent along the projected gradient B^T B g. So an eigenspace is a threat like any
other, only a smaller one, and every attack and objective that takes a `Threat` searches it. Source: papers/bounds.md,
section 5, whose published code has the same ascent for l2 and an approximate constraint for linf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from poise.robust.manifold.eigenbasis import Eigenbasis
from poise.robust.threats import Threat

__all__ = ["Departure", "Within", "departure"]

_ROUNDS = 10


@dataclass(frozen=True, eq=False)
class Within(Threat):
    """The perturbations of a ball that lie in the eigenspace of each example's class, or at right angles to it.

    Args:
        basis: on the device and in the precision of the images.
        labels: (N,), those of the examples that are attacked, in their order.
        off: the orthogonal complement instead.

    `project` gives a perturbation of the subspace and of the ball exactly, then moves it into the box, which may
    take it out of the subspace again: see `residual`.
    """

    basis: Eigenbasis = field(kw_only=True)
    labels: Tensor = field(kw_only=True)
    off: bool = field(default=False, kw_only=True)

    @cached_property
    def _groups(self) -> Sequence[tuple[Tensor | slice, int]]:
        return self.basis.groups(self.labels)

    def pick(self, rows: Tensor) -> Within:
        return Within(self.norm, self.eps, basis=self.basis, labels=self.labels[rows], off=self.off)

    def onto(self, delta: Tensor) -> Tensor:
        """The nearest point of the subspace to each of delta (N, ...)."""
        flat = delta.flatten(1)
        inside = torch.empty_like(flat)
        with torch.autocast(delta.device.type, enabled=False):  # in bf16 nothing would stay in the subspace
            for rows, index in self._groups:
                directions = self.basis.directions[index]
                inside[rows] = flat[rows] @ directions.T @ directions
        return (flat - inside if self.off else inside).view_as(delta)

    def project(self, x: Tensor, delta: Tensor) -> Tensor:
        """A perturbation near `delta`, by Dykstra's alternation between the subspace and what ball and box leave."""
        near, correction = self.onto(delta), torch.zeros_like(delta)
        for _ in range(_ROUNDS):
            inside = super().project(x, near + correction)
            correction = near + correction - inside
            near = self.onto(inside)
        return self.confine(x, self.shrink(near))

    def start_from(self, x: Tensor, uniform: Tensor) -> Tensor:
        """A random start of the ball, projected."""
        return self.project(x, super().start_from(x, uniform))

    def steepest(
        self, grad: Tensor, size: float | Tensor, *, at: Tensor | None = None, sparsity: int | Tensor = 1
    ) -> Tensor:
        """The step along the gradient in the coefficients.

        For linf it is as long in l2 as a step of signs, for l1 as a step of one coordinate, and `sparsity` counts for
        nothing: signs and single coordinates would leave the subspace, and projected back they come to rest well short
        of the optimum, which on a linear model is that of a linear program.
        """
        inner = self.onto(grad)
        length = size * math.sqrt(inner[0].numel()) if self.norm == "linf" else size
        return Threat("l2", self.eps).steepest(inner, length)


@dataclass(frozen=True)
class Departure:
    """How far perturbations have left their subspace, per example (N,).

    `residual` is the l2 distance of delta from the subspace, `share` that distance over the length of delta (0 where
    there is no delta), `clipped` the share of the pixels at which the part inside the subspace leaves the box.
    """

    residual: Tensor
    share: Tensor
    clipped: Tensor


def departure(x: Tensor, adversarial: Tensor, threat: Within) -> Departure:
    """What the box has made of perturbations that were searched in `threat`: all zero where it was not in the way."""
    delta = adversarial - x
    inside = threat.onto(delta)
    residual, length = (torch.linalg.vector_norm(part.flatten(1), dim=1) for part in (delta - inside, delta))
    rounding = torch.finfo(x.dtype).eps * x[0].numel()
    beyond = (x + inside < -rounding) | (x + inside > 1 + rounding)
    share = residual / length.clamp(min=torch.finfo(x.dtype).tiny)
    return Departure(residual, share, beyond.flatten(1).to(x.dtype).mean(1))
