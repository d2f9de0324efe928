"""The arguments of a worker and the function that it runs.

The driver and Ray's controller import this module too, so it does not import torch, which takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poise.spec import RunSpec

__all__ = ["WorkerArgs", "run_worker"]


@dataclass(frozen=True)
class WorkerArgs:
    """Arguments sent to every worker. Must not contain credentials: Ray logs them.

    `store` is absolute, `token` that of the run's lease, `folder` the driver's working directory, `coordinator` the
    handle of the actor.
    """

    spec: RunSpec
    store: str
    token: str
    folder: str
    coordinator: Any


def run_worker(config: dict[str, WorkerArgs]) -> None:
    """The training function of the worker group."""
    from poise.engine.ray.worker import work

    work(config["args"])
