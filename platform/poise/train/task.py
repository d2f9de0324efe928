"""What a kind of training plugs into the loop: a step function with its own state, and an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poise.observe.timers import PhaseTimers

__all__ = ["StepOutput", "Task", "TaskState", "Turn"]

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


@dataclass
class Task:
    """A training task.

    `batch(i)` is the i-th batch of this rank, counted from 0 over the whole run: random access is what makes a resume
    exact. `step` is called under autocast with the (possibly distributed) model. `evaluate` is called by every rank and
    returns the same numbers on each; `monitor` names the one that picks the best checkpoint: the larger the better,
    or the smaller with a `-` before the name. `unit` is what an example is called. `after(state, step)` is called when
    the optimizer has taken its `step`-th step, and returns the next state: for what follows the weights, as averages do.
    """

    model: nn.Module
    batch: Callable[[int], Any]
    step: Callable[[nn.Module, Any, TaskState, Turn], StepOutput]
    batches_per_epoch: int
    examples_per_batch: int
    seed: int = 0
    state: TaskState = field(default_factory=dict)
    evaluate: Callable[[], dict[str, float]] | None = None
    monitor: str = ""
    unit: str = "images"
    after: Callable[[TaskState, int], TaskState] | None = None
