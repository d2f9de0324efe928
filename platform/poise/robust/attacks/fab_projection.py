"""The shortest step onto a hyperplane that stays in the box [0, 1], exact in each norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from poise.robust.spec import Norm

__all__ = ["Hyperplanes"]

_NEWTON_ROUNDS = 25
_FLAT = 1e-8
_RELATIVE_FLAT = 1e-7


class Hyperplanes:
    """Hyperplanes with normals w (N, d), one per example. With a zero normal the step is zero.

    Under l1 and l2 a coordinate with |w| <= 1e-8 does not move: moving it to its corner would lengthen the step and
    gain nothing. 1e-8 is the number of the published code. Where it is more than 1e-7 times the largest |w|, the latter
    is the limit, so that a model of tiny slopes still gets a step. Under linf a further coordinate does not lengthen
    the step, and all of them move.
    """

    def __init__(self, w: Tensor, norm: Norm) -> None:
        self.norm = norm
        size = w.abs()  # (N, d)
        self.scale = size.amax(1, keepdim=True)  # (N, 1)
        if norm != "linf":
            # into a float tensor: on CPUs ten times faster than a bool mask
            moves = torch.gt(size, (_RELATIVE_FLAT * self.scale).clamp(max=_FLAT), out=torch.empty_like(size))
            size = size * moves
        self.sign = w.sign() * size.sign()
        self.size = size / self.scale.clamp(min=_tiny(w))  # in units of the largest |w|, against underflow
        self.order = self.size.argsort(dim=1, descending=True) if norm == "l1" else None

    def reach(self, point: Tensor, rise: Tensor) -> Tensor:
        """The shortest step (N, d) with w . step = rise (N,) and point + step in the box.

        Where the box does not reach the hyperplane, the step goes to the corner nearest to it. It is zero for a zero
        normal.
        """
        direction = self.sign * rise.sign().unsqueeze(1)  # (N, d)
        upwards = torch.gt(direction, 0, out=torch.empty_like(point))
        room = (upwards - point).abs()  # 1 - point where the coordinate rises, point where it falls
        # (N, 1): the rise in units of the largest |w|
        need = torch.where(self.scale > 0, rise.abs().unsqueeze(1) / self.scale.clamp(min=_tiny(point)), 0)
        if self.order is not None:
            return direction * _greedy(self.size, self.order, room, need)
        rates = None if self.norm == "linf" else self.size
        level = _level(self.size, rates, room, need)
        return direction * torch.minimum(_times_rates(level, rates), room)


def _greedy(size: Tensor, order: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """l1: each coordinate uses its whole room, the steepest first, until `need` is met."""
    sorted_size = size.gather(1, order)  # (N, d), steepest first
    sorted_room = room.gather(1, order)
    gained = (sorted_size * sorted_room).cumsum(1)
    gained_before = functional.pad(gained[:, :-1], (1, 0))
    missing = (need - gained_before).clamp(min=0)
    length = torch.minimum(missing / sorted_size.clamp(min=_tiny(size)), sorted_room)
    return torch.zeros_like(room).scatter(1, order, length)


def _level(size: Tensor, rates: Tensor | None, room: Tensor, need: Tensor) -> Tensor:
    """The t (N, 1) at which sum_i size_i min(t rate_i, room_i) is `need`: the lengths are then optimal.

    The sum is concave and piecewise linear in t. So Newton's method from 0 rises to t without passing it, and stays
    there once it has counted the coordinates that use all of their room. That takes about 4 rounds, and 25 only if
    nearly all coordinates are used up and their sizes differ by many orders of magnitude.
    """
    gain = size * room  # (N, d), of a coordinate that uses all of its room
    slope = _times_rates(size, rates)  # (N, d), gain per unit of t before that
    t = torch.zeros_like(need)
    # masks of 0 or 1, reused in every round: on CPUs ten times faster than a bool
    used = torch.empty_like(gain)
    free = torch.empty_like(gain)
    for _ in range(_NEWTON_ROUNDS):
        length = _times_rates(t, rates)
        torch.le(room, length, out=used)
        torch.gt(room, length, out=free)
        missing = need - torch.linalg.vecdot(gain, used).unsqueeze(1)  # (N, 1)
        steepness = torch.linalg.vecdot(slope, free).unsqueeze(1).clamp(min=_tiny(need))
        previous = t
        t = torch.maximum(t, missing / steepness).clamp(max=torch.finfo(need.dtype).max)
        # on other devices the comparison would synchronise, which costs more than the remaining rounds
        if t.device.type == "cpu" and torch.equal(previous, t):
            break
    return t


def _times_rates(values: Tensor, rates: Tensor | None) -> Tensor:
    """values * rates; with None all rates are 1."""
    return values if rates is None else values * rates


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
