"""The context of one worker: its rank, device and run, and how it reports, samples and communicates.

The training loop is the same in one process, under `torchrun` and in a Ray Train worker; only the context differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from poise.errors import PoiseError
from poise.inference.sampler import Sampler
from poise.observe.progress import Progress
from poise.observe.sinks import NullSink, Sink
from poise.spec import SamplerSpec
from poise.store.runs import Run
from poise.train.preemption import PROCESS, StopRequest

__all__ = ["Context"]

T = TypeVar("T")


def _no_report(progress: Progress) -> None:
    return None


def _no_lease() -> None:
    return None


def _no_sampler(spec: SamplerSpec, folder: Path) -> AbstractContextManager[Sampler]:
    raise PoiseError("this engine has no sampler")


@dataclass
class Context:
    """Rank, device, run and reporting of one worker.

    Attributes:
        run: the run in the store.
        attempt: number of restarts of the worker group so far.
        report: receives progress on rank 0.
        sampler: `sampler(spec, folder)` opens a sampler of the language model in a local folder; one rank calls it.
        check_lease: raises when another driver has taken over the run.
        sink: receives exported metrics.
        stop: whether this process was asked to end.
    """

    run: Run
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attempt: int = 0
    report: Callable[[Progress], None] = _no_report
    sampler: Callable[[SamplerSpec, Path], AbstractContextManager[Sampler]] = _no_sampler
    check_lease: Callable[[], None] = _no_lease
    sink: Sink = field(default_factory=NullSink)
    stop: StopRequest = PROCESS

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only rank that writes to the store."""
        return self.rank == 0

    def attempt_fields(self) -> dict[str, int]:
        """What events of training say of this attempt: its number, and how many workers it has."""
        return {"attempt": self.attempt, "workers": self.world_size}

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over all ranks, identical on every rank."""
        if self.world_size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def broadcast(self, value: Any) -> Any:
        """The `value` of rank 0, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def shard(self, count: int) -> range:
        """The places of this rank among `count` items: rank, rank + world_size, rank + 2 world_size, ..."""
        return range(self.rank, count, self.world_size)

    def unshard(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks in their order, on every rank. Each rank passes the items of its `shard`."""
        shards = self.gather(list(items))
        merged: list[Any] = [None] * sum(map(len, shards))
        for rank, shard in enumerate(shards):
            merged[rank :: self.world_size] = shard
        return merged

    def unshard_rows(self, rows: Tensor) -> Tensor:
        """As `unshard`, for items that are the rows of a tensor (n, ...): (N, ...), the rows of all ranks in order."""
        # Whole tensors are sent: a row is a view, and pickling one sends the storage of all rows with it.
        shards: list[Tensor] = self.gather(rows)
        merged = rows.new_empty(sum(map(len, shards)), *rows.shape[1:])
        for rank, shard in enumerate(shards):
            merged[rank :: self.world_size] = shard
        return merged

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Call `action` on rank 0; every rank returns its result.

        An exception of `action` is raised on every rank, so that no rank waits for ever.
        """
        result: Any = None
        failure: Exception | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as error:  # noqa: BLE001 - raised again below, on every rank
                failure = error
        result, failure = self.broadcast((result, failure))
        if failure is not None:
            raise failure
        return result

    def on_every_rank(self, action: Callable[[], T]) -> T:
        """Call `action` on every rank; each rank returns its own result, once all ranks have one.

        An exception of any rank is raised on every rank; of several, that of the lowest rank.
        """
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - raised again below, on every rank
            failure = error
        failures = [each for each in self.gather(failure) if each is not None]
        if failures:
            raise failures[0]
        return result
