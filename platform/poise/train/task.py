"""The interface between the training loop and a kind of training: its data, step function, state and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poise.observe.timers import PhaseTimers

__all__ = ["MonitorResult", "StepContext", "StepOutput", "Task", "TaskState"]

TaskState = dict[str, Tensor]


class StepOutput(NamedTuple):
    """The result of a step function: the loss to minimize, detached metrics, and the next state of the task."""

    loss: Tensor
    metrics: dict[str, Tensor]
    state: TaskState


class StepContext(NamedTuple):
    """The arguments that the loop passes to a step function about the current step.

    `generator` is seeded by (seed, step, rank). `mean` averages a tensor over all ranks.
    """

    step: int
    epoch: int
    first_in_epoch: bool
    generator: torch.Generator
    timers: PhaseTimers
    mean: Callable[[Tensor], Tensor]


class MonitorResult(NamedTuple):
    """The result of a monitor: metrics, the next state of the task, and an alarm in words, or None.

    With `stop`, an alarm ends the run, which is then rolled back to its newest checkpoint.
    """

    metrics: dict[str, float]
    state: TaskState
    alarm: str | None = None
    stop: bool = False


@dataclass
class Task:
    """A training task.

    Attributes:
        batch: `batch(i)` is the i-th batch of this rank, counted from 0 over the whole run. Random access makes an
            exact resume possible.
        step: the step function; called under autocast with the model, which is wrapped in DDP on several ranks.
        examples_per_batch: an example that several batches use counts once.
        state: the initial state of the task; part of every checkpoint.
        evaluate: called by every rank; must return the same numbers on each.
        monitor: the metric of `evaluate` that selects the best checkpoint: the largest value, or the smallest with a
            `-` before the name.
        unit: the name of examples in progress reports.
        after: `after(state, step)` is called after the optimizer has taken its `step`-th step and returns the next
            state, for averages of the weights and the like.
        watch: `watch(state)` is called by every rank before each `evaluate`; must return the same on each.
        repeats: number of consecutive steps that use the same batches.
    """

    model: nn.Module
    batch: Callable[[int], Any]
    step: Callable[[nn.Module, Any, TaskState, StepContext], StepOutput]
    batches_per_epoch: int
    examples_per_batch: float
    seed: int = 0
    state: TaskState = field(default_factory=dict)
    evaluate: Callable[[], dict[str, float]] | None = None
    monitor: str = ""
    unit: str = "images"
    after: Callable[[TaskState, int], TaskState] | None = None
    watch: Callable[[TaskState], MonitorResult] | None = None
    repeats: int = 1
