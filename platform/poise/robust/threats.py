"""Threat models: the intersection of a norm ball around an image with the box [0, 1] of valid images.

Shapes: x, delta, grad are (N, ...) with at least one trailing dimension; d is the number of values of one example.
Every function works per example, stays on the device of its input, and never synchronises with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import UserError
from poise.robust.spec import NORMS, Norm, oversized

__all__ = ["ORDERS", "StackedThreats", "Threat", "project_l1_ball"]

ORDERS: dict[str, float] = {"linf": math.inf, "l2": 2, "l1": 1}


@dataclass(frozen=True)
class Threat:
    """{delta : ||delta||_norm <= eps, 0 <= x + delta <= 1}; eps in pixel units of [0, 1]."""

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}: use one of {', '.join(NORMS)}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be finite and at least 0, not {self.eps}")

    @property
    def in_box(self) -> bool:
        """Whether x and x + delta are images in [0, 1]."""
        return True

    def check_eps(self, dimensions: int) -> None:
        """Raise UserError for a radius that is larger than the box of so many dimensions."""
        if self.in_box and (problem := oversized(self.norm, self.eps, dimensions)):
            raise UserError(problem)

    def project(self, x: Tensor, delta: Tensor) -> Tensor:
        """A feasible perturbation near `delta`; a feasible `delta` comes back unchanged.

        linf and l1: the nearest point of ball and box. For l1 that is a joint projection: projecting onto the ball and
        clipping to the box afterwards would waste budget. l2: onto the ball, then the box, which only shrinks
        coordinates and therefore stays in the ball.
        """
        if self.norm == "l1":
            room = torch.where(delta > 0, 1 - x, x)  # to the side of the box that delta points to
            return _project_l1(delta.flatten(1), room.flatten(1), self.eps).view_as(delta)
        in_ball = delta.clamp(-self.eps, self.eps) if self.norm == "linf" else self.scale_to_ball(delta)
        return self.clip_to_box(x, in_ball)

    def clip_to_box(self, x: Tensor, delta: Tensor) -> Tensor:
        """The nearest perturbation that leaves x + delta in the box."""
        return torch.minimum(torch.maximum(delta, -x), 1 - x)

    def scale_to_ball(self, delta: Tensor) -> Tensor:
        """delta scaled into the ball, in its own direction."""
        length = torch.linalg.vector_norm(delta.flatten(1), ord=ORDERS[self.norm], dim=1)  # (N,)
        # never above 1: a perturbation inside the ball is not stretched to its surface
        factor = (self.eps / length.clamp(min=_tiny(length))).clamp(max=1)
        return delta * _column(factor, delta)

    def select(self, rows: Tensor) -> Threat:
        """The threat that the examples `rows` face; for a plain ball it is the same for all."""
        return self

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A feasible perturbation: uniform in the ball, then clipped to the box. Drawn on the generator's device."""
        generator = torch.Generator() if generator is None else generator
        # every norm takes d + 1 numbers, so that the draws of one threat do not move those of the next
        shape = (len(x), math.prod(x.shape[1:]) + 1)
        uniform = torch.rand(shape, generator=generator, dtype=x.dtype, device=generator.device)
        return self.random_start_from(x, uniform)

    def random_start_from(self, x: Tensor, uniform: Tensor) -> Tensor:
        """The random start that follows from `uniform`, (N, d + 1) numbers in [0, 1): d for direction, one for radius.

        A direction of independent normal (l2) or Laplace (l1) values, scaled to length eps * u^(1/d), is uniform in the
        ball.
        """
        uniform = uniform.to(x.device)
        rounding = torch.finfo(uniform.dtype).eps
        # (N, d), uniform in (-1, 1) without the ends, where the quantile functions below are infinite
        signed = (2 * uniform[:, :-1] - 1).clamp(rounding - 1, 1 - rounding)
        if self.norm == "linf":
            return self.clip_to_box(x, (self.eps * signed).view_as(x))
        if self.norm == "l2":
            direction = torch.erfinv(signed)  # normal up to a factor, which the length divides out
            order = 2
        else:
            direction = -signed.sign() * signed.abs().clamp(min=rounding).log()  # Laplace
            order = 1
        length = torch.linalg.vector_norm(direction, ord=order, dim=1, keepdim=True).clamp(min=rounding)
        # the volume within radius r grows as r^d, so u^(1/d) makes the radius uniform in volume
        radius = self.eps * uniform[:, -1:] ** (1 / signed.shape[1])
        return self.clip_to_box(x, (direction / length * radius).view_as(x))

    def steepest_step(
        self, grad: Tensor, size: float | Tensor, *, at: Tensor | None = None, sparsity: int | Tensor = 1
    ) -> Tensor:
        """The steepest ascent step for `grad` of length `size`, a number or (N,), in this norm; 0 at a zero gradient.

        linf: size * sign(g). l2: size * g / ||g||. l1: the k = `sparsity` coordinates of largest |g| move by size / k
        each (k = 1 is the steepest step; a larger k spreads it over more coordinates). With `at` = x + delta, a
        coordinate moves at most to the side of the box, and the length that it could not use passes to the next largest
        |g|: no length is wasted on pixels that are blocked, wholly or nearly. `sparsity` may be counts (N,).
        """
        length = _column(size, grad) if isinstance(size, Tensor) else size
        if self.norm == "linf":
            return length * grad.sign()
        if self.norm == "l2":
            return length * _unit(grad)
        # the distance of each coordinate to the side of the box that the step moves to
        room = torch.full_like(grad, torch.inf) if at is None else torch.where(grad > 0, 1 - at, at).clamp(min=0)
        budget = size.view(-1, 1) if isinstance(size, Tensor) else size
        return _sparse_step(grad.flatten(1), room.flatten(1), budget, sparsity).view_as(grad)


@dataclass(frozen=True)
class StackedThreats(Threat):
    """P threats in one batch of P * N examples: the first N examples face the first of `parts`, and so on.

    Lengths are in units of each part's eps; `norm` and `eps` have no further meaning here.
    """

    norm: Norm = "linf"
    eps: float = 1.0
    parts: tuple[Threat, ...] = ()

    def check_eps(self, dimensions: int) -> None:
        """Raise UserError for a part whose radius is larger than the box of so many dimensions."""
        for part in self.parts:
            part.check_eps(dimensions)

    def project(self, x: Tensor, delta: Tensor) -> Tensor:
        """Each part's own projection."""
        return self._per_part(lambda part, x, delta: part.project(x, delta), x, delta)

    def random_start_from(self, x: Tensor, uniform: Tensor) -> Tensor:
        """Each part's own random start."""
        return self._per_part(lambda part, x, u: part.random_start_from(x, u), x, uniform.to(x.device))

    def steepest_step(
        self, grad: Tensor, size: float | Tensor, *, at: Tensor | None = None, sparsity: int | Tensor = 1
    ) -> Tensor:
        """Each part's own steepest step, of length size * eps."""
        counts = torch.as_tensor(sparsity, device=grad.device).expand(len(grad))  # (P * N,)

        def step(part: Threat, g: Tensor, k: Tensor, a: Tensor | None = None) -> Tensor:
            return part.steepest_step(g, size * part.eps, at=a, sparsity=k)

        if at is None:
            return self._per_part(step, grad, counts)
        return self._per_part(step, grad, counts, at)

    def _per_part(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        """function(part, *arguments) for each part and its N rows of every argument, concatenated."""
        chunks = [argument.chunk(len(self.parts)) for argument in arguments]  # of each argument, its rows per part
        blocks = zip(self.parts, *chunks, strict=True)
        return torch.cat([function(part, *block) for part, *block in blocks])


def project_l1_ball(v: Tensor, radius: float) -> Tensor:
    """The nearest point to each example of v (N, ...) with ||.||_1 <= radius, by sorting (Duchi et al., 2008)."""
    flat = v.flatten(1)
    return _project_l1(flat, flat.abs(), radius).view_as(v)


def _project_l1(v: Tensor, room: Tensor, radius: float) -> Tensor:
    """Nearest point to v (N, d) with ||.||_1 <= radius and every |coordinate| <= room (room on the side of v's sign).

    It is sign(v) * clip(|v| - t, 0, room) with the least t >= 0 at which f(t) = sum_i clip(|v_i| - t, 0, room_i) is at
    most the radius. f is piecewise linear: walking t down from max|v|, the slope grows by one at each |v_i| and falls
    by one at each |v_i| - room_i. Sorting those 2d points gives f at all of them and hence t without iteration.
    """
    size = v.abs()
    zeros = v.new_zeros(len(v), 1)
    # (N, 2d + 1): the values of t at which the slope of f changes, and by how much it changes there
    points = torch.cat([size, (size - room).clamp(min=0), zeros], dim=1)
    slope_changes = torch.cat([torch.ones_like(v), -torch.ones_like(v), zeros], dim=1)
    points, order = points.sort(dim=1, descending=True)
    slope = slope_changes.gather(1, order).cumsum(1)  # between each point and the next
    rise = slope[:, :-1] * (points[:, :-1] - points[:, 1:])  # (N, 2d)
    value = torch.cat([zeros, rise.cumsum(1)], dim=1)  # f at each point, rising from 0
    # the last point at which f is below the radius: t lies between it and the next
    before = ((value < radius).sum(1, keepdim=True) - 1).clamp(min=0)  # (N, 1)
    missing = radius - value.gather(1, before)
    threshold = points.gather(1, before) - missing / slope.gather(1, before).clamp(min=1)
    # where f(0) is at most the radius, v is in the ball already: t = 0
    threshold = threshold.masked_fill(value[:, -1:] <= radius, 0).clamp(min=0)
    return v.sign() * torch.minimum((size - threshold).clamp(min=0), room)


def _sparse_step(grad: Tensor, room: Tensor, size: float | Tensor, sparsity: int | Tensor) -> Tensor:
    """Spend `size` on the coordinates of grad (N, d) by falling |grad|; each takes at most its room and `size` / k."""
    counts = torch.as_tensor(sparsity, device=grad.device, dtype=grad.dtype)
    counts = counts.clamp(max=grad.shape[1]).view(-1, 1)  # (N, 1) or (1, 1)
    order = grad.abs().argsort(dim=1, descending=True)
    wanted = torch.minimum(room.gather(1, order), size / counts)  # (N, d)
    spent_before = wanted.cumsum(1) - wanted  # by the coordinates of larger |grad|
    length = torch.minimum(wanted, (size - spent_before).clamp(min=0))
    return torch.zeros_like(grad).scatter(1, order, length) * grad.sign()


def _unit(grad: Tensor) -> Tensor:
    """grad / ||grad||_2 per example. Scaled by the largest entry first: the squares of 1e-25 are zero in float32."""
    flat = grad.flatten(1)  # (N, d)
    scaled = flat / flat.abs().amax(1, keepdim=True).clamp(min=_tiny(flat))
    # at least 1, since the largest entry is 1; the clamp is for a gradient of 0, which stays 0
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp(min=1)
    unit: Tensor = scaled / length
    return unit.view_as(grad)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
