"""The one small object through which the loop touches the world: who am I, where do I compute, to whom do I report.

The loop is the same in one process, under `torchrun` and in a Ray Train worker; only the context differs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from poise.errors import PoiseError
from poise.models.sampling import Sampler
from poise.observe.progress import Progress
from poise.observe.sinks import NullSink, Sink
from poise.spec import SamplerSpec
from poise.store.runs import Run
from poise.train.preemption import PROCESS, StopRequest

__all__ = ["Context"]


def _silent(progress: Progress) -> None:
    return None


def _free() -> None:
    return None


def _no_sampler(spec: SamplerSpec, folder: Path) -> AbstractContextManager[Sampler]:
    raise PoiseError("this engine has no sampler")


@dataclass
class Context:
    """Rank, device, store and reporting of one worker.

    `report` receives progress on rank 0; `guard` raises when another driver has taken the run over; `attempt` counts
    restarts from 0. `sampler(spec, folder)` opens the sampler of the language model in a local folder; one rank does.
    `stop` says whether this process was asked to end.
    """

    run: Run
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attempt: int = 0
    report: Callable[[Progress], None] = _silent
    sampler: Callable[[SamplerSpec, Path], AbstractContextManager[Sampler]] = _no_sampler
    guard: Callable[[], None] = _free
    sink: Sink = field(default_factory=NullSink)
    stop: StopRequest = PROCESS

    @property
    def leads(self) -> bool:
        """True on the one rank that writes to the store."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over all ranks, the same on each."""
        if self.world_size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], Any]) -> Any:
        """Rank 0 acts; every rank gets what it returned, or raises what it raised, so that no rank waits for ever."""
        result: Any = None
        failure: Exception | None = None
        if self.leads:
            try:
                result = action()
            except Exception as error:  # noqa: BLE001 - it is raised again below, on every rank
                failure = error
        result, failure = self.broadcast((result, failure))
        if failure is not None:
            raise failure
        return result
