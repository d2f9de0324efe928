"""The board: one small actor between the gang and its driver.

Workers put progress, attempts and the errors that no restart can mend on it; the driver reads it twice a second. The
engines that a worker asks for samples are started here, so that they outlive the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from poise.observe.progress import Progress

__all__ = ["BoardState", "open_board"]


@dataclass
class BoardState:
    """What is on the board: gangs started so far, the newest progress, every evaluation so far, the error that ends
    the run. `stop` is by which signal the driver was asked to end, None while it was not."""

    attempts: int = 0
    progress: Progress | None = None
    evaluations: list[Progress] = field(default_factory=list)
    error: BaseException | None = None
    stop: str | None = None
    group: PlacementGroup | None = None
    """What the newest gang has set aside for itself."""


class _Board:
    def __init__(self) -> None:
        self.state = BoardState()
        self.engines: dict[int, Any] = {}

    def begin(self, rank: int, group: PlacementGroup | None) -> tuple[int, bool]:
        """A worker starts: how many gangs came before its own, and whether the run has ended for good."""
        if rank == 0:
            self.state.attempts += 1
            self.state.group = group
        return self.state.attempts - 1, self.state.error is not None

    def show(self, progress: Progress) -> None:
        if progress.evaluation:
            self.state.evaluations.append(progress)
        else:
            self.state.progress = progress

    def fail(self, error: BaseException) -> None:
        self.state.error = self.state.error or error

    def stop(self, reason: str) -> None:
        """The driver was asked to end: the workers commit what they have, and end."""
        self.state.stop = self.state.stop or reason

    def engine(self, index: int, start: Callable[[], Any], anew: bool) -> tuple[Any, bool]:
        """Engine `index`, and whether an earlier worker has left it; `anew`: that one is of no use."""
        inherited = index in self.engines and not anew
        if not inherited:
            self.engines[index] = start()
        return self.engines[index], inherited

    def forget_engines(self) -> None:
        self.engines.clear()

    def read(self, seen: int = 0) -> BoardState:
        """The state now, without the first `seen` evaluations."""
        return replace(self.state, evaluations=self.state.evaluations[seen:])


def open_board() -> Any:
    """Start a board; it lives as long as the driver."""
    return ray.remote(num_cpus=0, max_concurrency=1)(_Board).remote()
