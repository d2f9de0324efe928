"""The state of a run of APGD, and the rules for its step sizes.

Sources: Croce and Hein, "Reliable evaluation ..." (2020) for linf and l2, "Mind the box" (2021) for l1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from poise.robust.attacks.base import choose
from poise.robust.threats import Threat

__all__ = ["HalvingSchedule", "SparsitySchedule", "StepSchedule", "Walk", "checkpoints"]


def checkpoints(threat: Threat, steps: int) -> tuple[int, ...]:
    """The steps of a run after which the schedule of the step sizes is updated.

    linf and l2: 22 % of the run, then gaps that shrink by 3 % each down to 6 %. l1: every 4 %.
    """
    if threat.norm == "l1":
        gap = _percent(4, steps)
        return tuple(range(gap, steps + 1, gap))
    gap = _percent(22, steps)
    places = []
    step = gap
    while step <= steps:
        places.append(step)
        gap = max(gap - _percent(3, steps), _percent(6, steps))
        step += gap
    return tuple(places)


def _percent(share: int, steps: int) -> int:
    """`share` percent of the steps, rounded down, at least 1."""
    return max(steps * share // 100, 1)


@dataclass(frozen=True)
class Walk:
    """The current point of each example of a run, and the best point that it visited: all (N, ...)."""

    x: Tensor
    y: Tensor
    target: Tensor
    delta: Tensor
    previous: Tensor
    grad: Tensor
    loss: Tensor
    best: Tensor
    best_grad: Tensor
    best_loss: Tensor  # infinite once the model is fooled, so that the first fooling point is never replaced
    rises: Tensor  # number of steps since the last checkpoint that raised the loss
    finite: Tensor  # number of steps before the first gradient or loss that was not finite
    zero_gradient: Tensor  # bool, whether the gradient was zero at every point

    def back_to_best(self, where: Tensor) -> Walk:
        """The examples `where`, bool (N,), moved to their best point; counts start again for all."""
        return replace(
            self,
            delta=choose(where, self.best, self.delta),
            grad=choose(where, self.best_grad, self.grad),
            loss=torch.where(where, self.best_loss, self.loss),
            rises=torch.zeros_like(self.rises),
        )


class StepSchedule(Protocol):
    """The rule for the sizes of the steps."""

    def step(self, threat: Threat, walk: Walk, *, first: bool) -> Tensor:
        """The next delta."""

    def update(self, walk: Walk, gap: int) -> tuple[StepSchedule, Tensor]:
        """The schedule after a checkpoint, and which examples go back to their best point, bool (N,).

        The checkpoint is `gap` steps after the previous one.
        """


@dataclass(frozen=True)
class HalvingSchedule:
    """linf and l2: steps of 2 eps with momentum 0.75, halved where they no longer raise the loss."""

    size: Tensor  # (N,), of the next step
    best_before: Tensor  # (N,), the highest loss at the last checkpoint
    halved: Tensor  # bool (N,), at the last checkpoint

    @classmethod
    def begin(cls, threat: Threat, walk: Walk) -> HalvingSchedule:
        size = torch.full_like(walk.best_loss, 2 * threat.eps)
        return cls(size, walk.best_loss, torch.zeros_like(walk.y, dtype=torch.bool))

    def step(self, threat: Threat, walk: Walk, *, first: bool) -> Tensor:
        ascent = threat.project(walk.x, walk.delta + threat.steepest_step(walk.grad, self.size))
        if first:
            return ascent
        mixed = walk.delta + 0.75 * (ascent - walk.delta) + 0.25 * (walk.delta - walk.previous)
        return threat.project(walk.x, mixed)

    def update(self, walk: Walk, gap: int) -> tuple[HalvingSchedule, Tensor]:
        stalled = ~self.halved & (walk.best_loss <= self.best_before)
        halve = (walk.rises < 0.75 * gap) | stalled
        size = torch.where(halve, self.size / 2, self.size)
        return HalvingSchedule(size, walk.best_loss, halve), halve


@dataclass(frozen=True)
class SparsitySchedule:
    """l1: steps over two thirds as many coordinates as the best point changes.

    Steps shrink at each checkpoint, and are long again where the best point became sparser.
    """

    eps: float
    size: Tensor  # (N,), of the next step
    count: Tensor  # (N,), coordinates that the next step moves
    changed: Tensor  # (N,), coordinates that the best point changed at the last checkpoint

    @classmethod
    def begin(cls, threat: Threat, walk: Walk, share: float | None) -> SparsitySchedule:
        """The first steps move `share` of the coordinates; with None, by how many the start of the run changes."""
        width = torch.full_like(walk.best_loss, walk.x[0].numel())  # (N,), all coordinates
        if share is None:
            changed = _changed(walk)
            count = changed / 1.5
        else:
            changed = width
            count = share * width
        return cls(threat.eps, torch.full_like(width, threat.eps), count.floor().clamp(min=1), changed)

    def step(self, threat: Threat, walk: Walk, *, first: bool) -> Tensor:
        ascent = threat.steepest_step(walk.grad, self.size, at=walk.x + walk.delta, sparsity=self.count)
        return threat.project(walk.x, walk.delta + ascent)

    def update(self, walk: Walk, gap: int) -> tuple[SparsitySchedule, Tensor]:
        changed = _changed(walk)
        sparser = changed < 0.95 * self.changed
        size = torch.where(sparser, self.eps, (self.size / 1.5).clamp(min=self.eps / 10))
        count = (changed / 1.5).floor().clamp(min=1)
        return replace(self, size=size, count=count, changed=changed), sparser


def _changed(walk: Walk) -> Tensor:
    """The number of coordinates that the best point changes, (N,)."""
    return (walk.best.flatten(1) != 0).sum(1).to(walk.best_loss.dtype)
