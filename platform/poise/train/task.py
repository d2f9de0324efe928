"""What a kind of training plugs into the loop: a step function with its own state, and an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poise.observe.timers import PhaseTimers

__all__ = ["StepOutput", "Task", "TaskState", "Turn", "Watch"]

TaskState = dict[str, Tensor]


class StepOutput(NamedTuple):
    """What one step function returns: the loss to descend, detached metrics, and the next state of the task."""

    loss: Tensor
    metrics: dict[str, Tensor]
    state: TaskState


class Turn(NamedTuple):
    """What the loop tells a step function about the step that it takes."""

    step: int
    epoch: int
    first_in_epoch: bool
    generator: torch.Generator
    timers: PhaseTimers
    mean: Callable[[Tensor], Tensor]


class Watch(NamedTuple):
    """What a look at the training itself has found: metrics, the next state of the task, and in words what is wrong.

    With `stop` an alarm ends the run, which then goes back to its newest checkpoint.
    """

    metrics: dict[str, float]
    state: TaskState
    alarm: str | None = None
    stop: bool = False


@dataclass
class Task:
    """A training task.

    `batch(i)` is the i-th batch of this rank, counted from 0 over the whole run: random access is what makes a resume
    exact. `step` is called under autocast with the (possibly distributed) model. `evaluate` is called by every rank and
    returns the same numbers on each; `monitor` names the one that picks the best checkpoint: the larger the better,
    or the smaller with a `-` before the name. `unit` is what an example is called; of those that
    several batches learn from, `examples_per_batch` counts each once. `after(state, step)` is called when
    the optimizer has taken its `step`-th step, and returns the next state: for what follows the weights, as averages
    do. `watch(state)` is called before each `evaluate`, by every rank, and finds the same on each. `repeats`: steps in
    a row that learn from the same batches.
    """

    model: nn.Module
    batch: Callable[[int], Any]
    step: Callable[[nn.Module, Any, TaskState, Turn], StepOutput]
    batches_per_epoch: int
    examples_per_batch: float
    seed: int = 0
    state: TaskState = field(default_factory=dict)
    evaluate: Callable[[], dict[str, float]] | None = None
    monitor: str = ""
    unit: str = "images"
    after: Callable[[TaskState, int], TaskState] | None = None
    watch: Callable[[TaskState], Watch] | None = None
    repeats: int = 1
