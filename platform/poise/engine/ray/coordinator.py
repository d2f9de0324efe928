"""The coordinator: one small actor between the worker group and its driver.

Workers write progress, attempts and the errors that no restart can mend to it; the driver reads it twice a second. It
also starts the engines of a sampler pool, so that they outlive the worker that uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from poise.observe.progress import Progress

__all__ = ["CoordinatorState", "start_coordinator"]


@dataclass
class CoordinatorState:
    """State of a run that its workers and its driver share."""

    attempts: int = 0
    """Number of worker groups started so far."""
    progress: Progress | None = None
    """The newest progress that is not an evaluation."""
    evaluations: list[Progress] = field(default_factory=list)
    """Every evaluation so far, in order."""
    error: BaseException | None = None
    """The error that ends the run."""
    stop: str | None = None
    """The signal by which the driver was asked to end; None while it was not."""
    group: PlacementGroup | None = None
    """The placement group of the newest worker group."""


class _Coordinator:
    def __init__(self) -> None:
        self.state = CoordinatorState()
        self.failed_ranks: set[int] = set()
        self.engines: dict[int, Any] = {}

    def begin(self, rank: int, group: PlacementGroup | None) -> tuple[int, bool]:
        """Register a worker that starts. Returns the number of earlier worker groups, and whether the run has ended."""
        if rank == 0:
            self.state.attempts += 1
            self.state.group = group
        return self.state.attempts - 1, self.state.error is not None

    def show(self, progress: Progress) -> None:
        """Record progress, or an evaluation."""
        if progress.evaluation:
            self.state.evaluations.append(progress)
        else:
            self.state.progress = progress

    def fail(self, error: BaseException, rank: int | None = None) -> None:
        """Record the error that ends the run, and the worker that met it; the first error counts."""
        self.state.error = self.state.error or error
        if rank is not None:
            self.failed_ranks.add(rank)

    def num_failed(self) -> int:
        """The number of workers that met an error that ends the run; those of later worker groups do not run it."""
        return len(self.failed_ranks)

    def stop(self, reason: str) -> None:
        """Record that the driver was asked to end; the workers then commit their step and end."""
        self.state.stop = self.state.stop or reason

    def engine(self, index: int, start: Callable[[], Any], replace_engine: bool) -> tuple[Any, bool]:
        """Engine `index`, and whether an earlier worker started it. `replace_engine` starts another in any case."""
        inherited = index in self.engines and not replace_engine
        if not inherited:
            self.engines[index] = start()
        return self.engines[index], inherited

    def forget_engines(self) -> None:
        """Drop the handles of all engines, which the pool has killed."""
        self.engines.clear()

    def read(self, seen: int = 0) -> CoordinatorState:
        """The current state, without the first `seen` evaluations."""
        return replace(self.state, evaluations=self.state.evaluations[seen:])


def start_coordinator() -> Any:
    """Start a coordinator, which lives as long as the driver, and return its handle."""
    return ray.remote(num_cpus=0, max_concurrency=1)(_Coordinator).remote()
