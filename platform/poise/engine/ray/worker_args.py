"""The arguments of a worker and the function that it runs.

Ray's controller imports this module too and receives the arguments, so neither needs torch, which takes seconds.
"""

from __future__ import annotations

import pickle
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poise.errors import UserError

if TYPE_CHECKING:
    from poise.spec import RunSpec

__all__ = ["WorkerArgs", "run_worker"]


@dataclass(frozen=True)
class WorkerArgs:
    """Arguments sent to every worker. Must not contain credentials: Ray logs them.

    `store` is absolute, `token` that of the run's lease, `folder` the driver's working directory, `coordinator` the
    handle of the actor. The spec stays pickled until a worker asks for it: its class may import torch, and Ray could
    not explain a failure to read it.
    """

    pickled_spec: bytes
    store: str
    token: str
    folder: str
    coordinator: Any

    @property
    def spec(self) -> RunSpec:
        """The spec of the run.

        Raises:
            UserError: a module that the spec needs, such as one of the user's own kinds, is not on this machine.
        """
        try:
            spec: RunSpec = pickle.loads(self.pickled_spec)
        except ImportError as error:
            raise UserError(
                f"the machine {socket.gethostname()} lacks a module that this spec needs ({error}): install it on "
                "every machine of the cluster"
            ) from None
        return spec


def run_worker(config: dict[str, WorkerArgs]) -> None:
    """The training function of the worker group."""
    from poise.engine.ray.worker import work

    work(config["args"])
