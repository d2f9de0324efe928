"""Learning-rate factors as pure functions of the step, without state that would have to be saved."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import singledispatch

from poise.train.spec import Constant, Cosine, Linear, OneCycle, Piecewise, Schedule

__all__ = ["factor"]


def factor(schedule: Schedule, step: int, total: int) -> float:
    """The factor on the learning rate at optimizer step `step` of `total`, counted from 0.

    The share of the run is step / total, which is below 1 at the last step, so that a schedule that ends at 0 still
    trains there. Warm-up multiplies by (step + 1) / warmup_steps.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return warmup * _shape(schedule, step / total)


def _half_cosine(start: float, end: float, share: float) -> float:
    """From `start` at share 0 to `end` at share 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@singledispatch
def _shape(schedule: object, share: float) -> float:
    """The factor without warm-up at a share of the run."""
    raise TypeError(f"no such schedule: {schedule!r}")


@_shape.register
def _(schedule: Constant, share: float) -> float:
    return 1.0


@_shape.register
def _(schedule: Piecewise, share: float) -> float:
    passed = bisect_right(schedule.milestones, share)  # milestones up to this share, itself included
    return float(schedule.factor) ** passed


@_shape.register
def _(schedule: Linear, share: float) -> float:
    after = bisect_right([point[0] for point in schedule.points], share)
    x0, y0 = schedule.points[after - 1]
    x1, y1 = schedule.points[min(after, len(schedule.points) - 1)]
    if x1 == x0:  # at the last point
        return float(y0)
    return y0 + (y1 - y0) * (share - x0) / (x1 - x0)


@_shape.register
def _(schedule: Cosine, share: float) -> float:
    return _half_cosine(1.0, schedule.final, share)


@_shape.register
def _(schedule: OneCycle, share: float) -> float:
    if share < schedule.peak:
        return _half_cosine(schedule.start, 1.0, share / schedule.peak)
    return _half_cosine(1.0, schedule.final, (share - schedule.peak) / (1 - schedule.peak))
