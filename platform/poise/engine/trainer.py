"""Ray's trainer for a gang of torch processes, with no more started than a gang needs.

Ray's own TorchTrainer has the same process group, but loads torch into the driver and the controller as well, and
starts actors for data sets that it never reads and for machines that nobody can add.
"""

from __future__ import annotations

import signal
import socket
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from poise.engine.network import Rank, join_process_group, listen, use_interface
from poise.train.preemption import PROCESS

__all__ = ["ProcessGroup", "Trainer"]

_TIMEOUT = timedelta(minutes=30)
_LEAVE_WITHIN_S = 30.0
_meeting: list[socket.socket] = []
"""In the process of rank 0, between choosing a port and joining: the socket that holds it."""


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """`private`: the cluster ends with this process and cannot grow.

    It needs nobody to tidy up after a controller that died, and nobody to ask for more machines.
    """

    def __init__(self, *args: Any, private: bool, **options: Any) -> None:
        self._private = private
        super().__init__(*args, **options)

    # Both are Ray's own, and private: under other names they would not be called, and only the actors would be back.

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if self._private else set())
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in unneeded]

    def _initialize_and_run_controller(self, *, scaling_policy: Any, **options: Any) -> Any:
        if self._private and type(scaling_policy) is FixedScalingPolicy:
            scaling_policy = _AsItIs(scaling_policy.scaling_config)
        return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **options)


class _AsItIs(FixedScalingPolicy):  # type: ignore[misc]
    """A gang of a fixed size on a cluster that nobody scales: nothing is sent to Ray's autoscaling coordinator."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


@dataclass
class ProcessGroup(BackendConfig):  # type: ignore[misc]
    """All workers in one group of torch.distributed; `backend`: nccl or gloo."""

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroups


class _ProcessGroups(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        address, port = worker_group.execute_single(0, _meeting_place)
        worker_group.execute(_join, backend_config.backend, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        leaving = worker_group.execute_async(_leave)
        ray.wait(leaving, num_returns=len(leaving), timeout=_LEAVE_WITHIN_S)  # a dead worker has nothing to leave


def _meeting_place() -> tuple[str, int]:
    """Where the others reach rank 0: the address of its node, and a port at which it listens from now on."""
    address = ray.util.get_node_ip_address()
    _meeting.append(listen(address))
    return address, _meeting[-1].getsockname()[1]


def _join(backend: str, address: str, port: int) -> None:
    """Enter the group through the interface of this process's node."""
    _take_signals()
    context = ray.train.get_context()
    use_interface(ray.util.get_node_ip_address())
    place = Rank(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node_rank=context.get_node_rank(),
    )
    join_process_group(backend, address, port, place, _TIMEOUT, _meeting.pop() if place.rank == 0 else None)


def _take_signals() -> None:
    """A worker whose machine is taken away commits its step first. Ray calls this in the main thread."""
    ending = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread() and callable(ending):
        PROCESS.install(ending)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
