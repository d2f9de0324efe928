"""The torch process group of a Ray Train worker group, as a backend for Ray's DataParallelTrainer.

Ray's own TorchConfig forms a process group too, but lets gloo choose the network interface, which is loopback where the
host name resolves to it, and imports torch into the controller. `Backend` and `BackendConfig` are developer APIs of
Ray: documented, and allowed to change with a minor release.
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
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from poise.engine.network import Rank, join_process_group, listen, use_interface
from poise.train.preemption import PROCESS

__all__ = ["PrivateTrainer", "ProcessGroup"]

_TIMEOUT = timedelta(minutes=30)
_LEAVE_WITHIN_S = 30.0
_rendezvous: list[socket.socket] = []
"""In the process of rank 0, between choosing a port and joining the group: the socket that reserves the port."""


class PrivateTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray's trainer for a cluster that ends with this process: without the actor that removes placement groups.

    That actor asks a cluster that it finds on this machine whether the run is alive. With several, that may be another
    one, which does not know the run. The method is a private one of Ray; under another name it is not called, and the
    actor is started.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]


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
