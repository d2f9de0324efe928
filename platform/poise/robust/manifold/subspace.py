"""Perturbations in the eigenspaces of the data (on the manifold), or orthogonal to them (off the manifold).

For an orthonormal basis B (r, d) a perturbation delta = B^T c has ||delta||_2 = ||c||_2. Steepest ascent in the
coefficients c is, in pixels, ascent along the projected gradient B^T B g. So an eigenspace is a threat like any other,
only a smaller one, and every attack and objective that takes a `Threat` can search it. Source: arXiv
2210.00430, whose published code has the same ascent for l2 and an approximate constraint for linf.
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

__all__ = ["EigenspaceThreat", "SubspaceResidual", "subspace_residual"]

_DYKSTRA_ROUNDS = 10


@dataclass(frozen=True, eq=False)
class EigenspaceThreat(Threat):
    """The perturbations of a ball that lie in the eigenspace of each example's class, or orthogonal to it.

    Args:
        basis: on the device and in the precision of the images.
        labels: (N,), of the attacked examples, in their order.
        off: whether it is the orthogonal complement of the eigenspace instead.

    `project` gives a perturbation of the subspace and of the ball exactly, then moves it into the box, which may
    take it out of the subspace again: see `subspace_residual`.
    """

    basis: Eigenbasis = field(kw_only=True)
    labels: Tensor = field(kw_only=True)
    off: bool = field(default=False, kw_only=True)

    @cached_property
    def _groups(self) -> Sequence[tuple[Tensor | slice, int]]:
        return self.basis.groups(self.labels)

    def select(self, rows: Tensor) -> EigenspaceThreat:
        return EigenspaceThreat(self.norm, self.eps, basis=self.basis, labels=self.labels[rows], off=self.off)

    def onto(self, delta: Tensor) -> Tensor:
        """The nearest point of the subspace to each of delta (N, ...)."""
        flat = delta.flatten(1)
        inside = torch.empty_like(flat)
        with torch.autocast(delta.device.type, enabled=False):  # bf16 rounding would leave the subspace
            for rows, index in self._groups:
                directions = self.basis.directions[index]
                inside[rows] = flat[rows] @ directions.T @ directions  # (n, d) -> (n, r) -> (n, d)
        return (flat - inside if self.off else inside).view_as(delta)

    def project(self, x: Tensor, delta: Tensor) -> Tensor:
        """A feasible perturbation near `delta`: Dykstra's alternating projections onto the subspace and the threat."""
        near = self.onto(delta)
        correction = torch.zeros_like(delta)
        for _ in range(_DYKSTRA_ROUNDS):
            # Dykstra: what the last projection onto the threat removed is put back before the next one. Without
            # it, alternating projections end at a common point that is not the nearest. The subspace is linear and
            # needs no correction of its own.
            inside = super().project(x, near + correction)
            correction = near + correction - inside
            near = self.onto(inside)
        return self.clip_to_box(x, self.scale_to_ball(near))

    def random_start_from(self, x: Tensor, uniform: Tensor) -> Tensor:
        """A random start in the ball, projected."""
        return self.project(x, super().random_start_from(x, uniform))

    def steepest_step(
        self, grad: Tensor, size: float | Tensor, *, at: Tensor | None = None, sparsity: int | Tensor = 1
    ) -> Tensor:
        """The step along the gradient in the coefficients.

        For linf it is as long in l2 as a step of signs, for l1 as a step of one coordinate; `sparsity` has no effect.
        Signs and single coordinates would leave the subspace, and projected back they stop well short of the optimum
        (on a linear model that is the optimum of a linear program).
        """
        gradient_inside = self.onto(grad)
        # sign(g) of length `size` in linf has length size * sqrt(d) in l2
        length = size * math.sqrt(gradient_inside[0].numel()) if self.norm == "linf" else size
        return Threat("l2", self.eps).steepest_step(gradient_inside, length)


@dataclass(frozen=True)
class SubspaceResidual:
    """How far perturbations have left their subspace, per example (N,).

    `residual` is the l2 distance of delta from the subspace, `share` that distance divided by the length of delta (0
    where delta is 0), `clipped` the share of the pixels at which the part inside the subspace leaves the box.
    """

    residual: Tensor
    share: Tensor
    clipped: Tensor


def subspace_residual(x: Tensor, adversarial: Tensor, threat: EigenspaceThreat) -> SubspaceResidual:
    """How far the box moved perturbations out of the subspace of `threat`; all zero where it did not clip any."""
    delta = adversarial - x
    inside = threat.onto(delta)
    residual = torch.linalg.vector_norm((delta - inside).flatten(1), dim=1)
    length = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    # a sum over d products is off by up to d roundings: less than that beyond the box is no clipping
    rounding = torch.finfo(x.dtype).eps * x[0].numel()
    beyond = (x + inside < -rounding) | (x + inside > 1 + rounding)
    share = residual / length.clamp(min=torch.finfo(x.dtype).tiny)
    return SubspaceResidual(residual, share, beyond.flatten(1).to(x.dtype).mean(1))
