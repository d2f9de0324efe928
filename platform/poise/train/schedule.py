"""Learning-rate factors as pure functions of the step: there is no state to save and none to lose."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import singledispatch

from poise.train.spec import Constant, Cosine, Linear, OneCycle, Piecewise, Schedule

__all__ = ["factor"]


def factor(schedule: Schedule, step: int, total: int) -> float:
    """The factor on the learning rate at optimizer step `step` of `total`, counted from 0.

    The share of the run is step / total, so that the last step still trains; warm-up multiplies by (step + 1) / warmup.
    """
    warm = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return warm * _shape(schedule, step / total)


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@singledispatch
def _shape(schedule: object, share: float) -> float:
    raise TypeError(f"no such schedule: {schedule!r}")


@_shape.register
def _(schedule: Constant, share: float) -> float:
    return 1.0


@_shape.register
def _(schedule: Piecewise, share: float) -> float:
    return float(schedule.factor) ** bisect_right(schedule.milestones, share)


@_shape.register
def _(schedule: Linear, share: float) -> float:
    at = bisect_right([point[0] for point in schedule.points], share)
    (x0, y0), (x1, y1) = schedule.points[at - 1], schedule.points[min(at, len(schedule.points) - 1)]
    return float(y0) if x1 == x0 else y0 + (y1 - y0) * (share - x0) / (x1 - x0)


@_shape.register
def _(schedule: Cosine, share: float) -> float:
    return _half_cosine(1.0, schedule.final, share)


@_shape.register
def _(schedule: OneCycle, share: float) -> float:
    if share < schedule.peak:
        return _half_cosine(schedule.start, 1.0, share / schedule.peak)
    return _half_cosine(1.0, schedule.final, (share - schedule.peak) / (1 - schedule.peak))
