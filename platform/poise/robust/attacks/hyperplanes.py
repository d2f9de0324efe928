"""The shortest step onto a hyperplane that stays in the box [0, 1], exact in each norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from poise.robust.spec import Norm

__all__ = ["Hyperplanes"]

_ROUNDS = 25
_FLAT, _NOISE = 1e-8, 1e-7


class Hyperplanes:
    """Hyperplanes with normals w (N, d), one per example; a zero normal is reached from nowhere.

    Under l1 and l2 a coordinate of |w| <= 1e-8 stays: going to a corner it would cost its whole room and bring nothing.
    That is the published code's number; where it is more than a 1e-7th of the largest |w|, the latter counts, so that a
    model of tiny slopes is not left alone. Under linf a coordinate costs nothing, and all go.
    """

    def __init__(self, w: Tensor, norm: Norm) -> None:
        self.norm, size = norm, w.abs()
        self.scale = size.amax(1, keepdim=True)
        if norm != "linf":
            size = size * torch.gt(size, (_NOISE * self.scale).clamp(max=_FLAT), out=torch.empty_like(size))
        self.sign = w.sign() * size.sign()
        self.size = size / self.scale.clamp(min=_tiny(w))
        self.order = self.size.argsort(dim=1, descending=True) if norm == "l1" else None

    def reach(self, point: Tensor, rise: Tensor) -> Tensor:
        """The shortest step (N, d) with w . step = rise (N,) and point + step in the box.

        Where the box does not reach the hyperplane, the step to the corner nearest to it; zero for a zero normal.
        """
        direction = self.sign * rise.sign().unsqueeze(1)
        room = (torch.gt(direction, 0, out=torch.empty_like(point)) - point).abs()  # 1 - point where it rises, or point
        need = torch.where(self.scale > 0, rise.abs().unsqueeze(1) / self.scale.clamp(min=_tiny(point)), 0)
        if self.order is not None:
            return direction * _greedy(self.size, self.order, room, need)
        pull = None if self.norm == "linf" else self.size
        return direction * torch.minimum(_pulled(_level(self.size, pull, room, need), pull), room)


def _greedy(size: Tensor, order: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """l1: each coordinate goes its whole room, the steepest first, until `need` is met."""
    steep, wide = size.gather(1, order), room.gather(1, order)
    spent = functional.pad((steep * wide).cumsum(1)[:, :-1], (1, 0))
    missing = (need - spent).clamp(min=0)
    length = torch.minimum(missing / steep.clamp(min=_tiny(size)), wide)
    return torch.zeros_like(room).scatter(1, order, length)


def _level(size: Tensor, pull: Tensor | None, room: Tensor, need: Tensor) -> Tensor:
    """The t (N, 1) at which sum_i size_i min(t pull_i, room_i) is `need`: the lengths are then optimal.

    The sum is concave and piecewise linear in t, so that Newton's method from 0 climbs to t without passing it, and
    stays where it is once it has counted the coordinates that use all of their room: in some 4 rounds, and 25 only if
    nearly all are used and their sizes differ by many orders of magnitude.
    """
    gain, slope, t = size * room, _pulled(size, pull), torch.zeros_like(need)
    used, free = torch.empty_like(gain), torch.empty_like(gain)  # 0 or 1: on CPUs ten times faster than a bool
    for _ in range(_ROUNDS):
        length = _pulled(t, pull)
        torch.le(room, length, out=used)
        torch.gt(room, length, out=free)
        missing = need - torch.linalg.vecdot(gain, used).unsqueeze(1)
        steepness = torch.linalg.vecdot(slope, free).unsqueeze(1).clamp(min=_tiny(need))
        before, t = t, torch.maximum(t, missing / steepness).clamp(max=torch.finfo(need.dtype).max)
        if t.device.type == "cpu" and torch.equal(before, t):  # elsewhere the question costs more than the rounds
            break
    return t


def _pulled(length: Tensor, pull: Tensor | None) -> Tensor:
    """None pulls all coordinates alike."""
    return length if pull is None else length * pull


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
