"""The arguments of a worker and the function that it runs.

Ray's controller imports this module too and receives the arguments, so neither needs torch, which takes seconds.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poise.spec import RunSpec

__all__ = ["WorkerArgs", "run_worker"]


@dataclass(frozen=True)
class WorkerArgs:
    """Arguments sent to every worker. Must not contain credentials: Ray logs them.

    `store` is absolute, `token` that of the run's lease, `folder` the driver's working directory, `coordinator` the
    handle of the actor. The spec stays pickled until a worker asks for it: its class may import torch.
    """

    pickled_spec: bytes
    store: str
    token: str
    folder: str
    coordinator: Any

    @property
    def spec(self) -> RunSpec:
        """The spec of the run."""
        spec: RunSpec = pickle.loads(self.pickled_spec)
        return spec


def run_worker(config: dict[str, WorkerArgs]) -> None:
    """The training function of the worker group."""
    from poise.engine.ray.worker import work

    work(config["args"])
