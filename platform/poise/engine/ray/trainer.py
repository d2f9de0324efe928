"""Ray's trainer for a group of torch processes, which starts only the actors that a worker group needs.

Ray's own TorchTrainer forms the same process group, but also loads torch into the controller, and starts actors
for data sets that are not used and for machines that cannot be added.
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
_rendezvous: list[socket.socket] = []
"""In the process of rank 0, between choosing a port and joining the group: the socket that reserves the port."""


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """A DataParallelTrainer without Ray's data set actors.

    `private`: the cluster ends with this process and cannot grow, so neither the actor that cleans up after a dead
    controller nor requests for more machines are needed.
    """

    def __init__(self, *args: Any, private: bool, **options: Any) -> None:
        self._private = private
        super().__init__(*args, **options)

    # Both methods override private ones of Ray. If a version of Ray renames them, they are not called: the only effect
    # is that the unneeded actors start again.

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = {"DatasetsCallback"}
        if self._private:
            unneeded.add("PlacementGroupCleanerCallback")
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in unneeded]

    def _initialize_and_run_controller(self, *, scaling_policy: Any, **options: Any) -> Any:
        if self._private and type(scaling_policy) is FixedScalingPolicy:
            scaling_policy = _LocalScalingPolicy(scaling_policy.scaling_config)
        return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **options)


class _LocalScalingPolicy(FixedScalingPolicy):  # type: ignore[misc]
    """A fixed number of workers on a cluster without an autoscaler: sends nothing to Ray's autoscaling coordinator."""

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
        address, port = worker_group.execute_single(0, _open_rendezvous)
        worker_group.execute(_join, backend_config.backend, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        refs = worker_group.execute_async(_leave)
        ray.wait(refs, num_returns=len(refs), timeout=_LEAVE_WITHIN_S)  # not ray.get, which raises for a dead worker


def _open_rendezvous() -> tuple[str, int]:
    """Listen for the other ranks on a free port of this node; returns the node's address and the port."""
    address = ray.util.get_node_ip_address()
    _rendezvous.append(listen(address))
    return address, _rendezvous[-1].getsockname()[1]


def _join(backend: str, address: str, port: int) -> None:
    """Join the process group through the network interface that holds the address of this node."""
    _install_signal_handler()
    context = ray.train.get_context()
    use_interface(ray.util.get_node_ip_address())
    rank = Rank(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node_rank=context.get_node_rank(),
    )
    listener = _rendezvous.pop() if rank.rank == 0 else None
    join_process_group(backend, address, port, rank, _TIMEOUT, listener)


def _install_signal_handler() -> None:
    """Make a worker whose machine is taken away commit its step before it ends. Ray calls this in the main thread."""
    ray_handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread() and callable(ray_handler):
        PROCESS.install(ray_handler)


def _leave() -> None:
    """Leave the process group, if this process has joined it."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
