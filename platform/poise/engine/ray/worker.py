"""Runs in each worker of a Ray Train worker group: makes the context of the run and runs its kind in it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.placement_group import get_current_placement_group

from poise import kinds
from poise.engine.ray.metrics import RaySink
from poise.engine.ray.sampler_pool import SamplerPool
from poise.engine.ray.worker_args import WorkerArgs
from poise.errors import PoiseError, PreemptedError, RunBusyError
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.spec import SamplerSpec
from poise.store.lease import Lease
from poise.store.runs import Run, open_run
from poise.train.context import Context
from poise.train.preemption import PROCESS

__all__ = ["work"]

_POLL_EVERY_S = 1.0
_ALL_FAIL_WITHIN_S = 3.0


def work(args: WorkerArgs) -> None:
    """Run the spec of `args` as one worker of the group.

    A restart does not mend a malformed data set or a loss that is not finite: a PoiseError is recorded on the
    coordinator, from which the driver raises it. If every worker meets one, as with an error that rank 0 shares with
    all, each returns, and Ray starts no other worker group. If only some do, they raise it, since Ray does not end
    workers that wait for one that has returned; the worker group that Ray starts next then ends at once.
    """
    context = ray.train.get_context()
    rank = context.get_world_rank()
    attempt, has_ended = ray.get(args.coordinator.begin.remote(rank, get_current_placement_group()))
    if has_ended:
        return
    if Path(args.folder).is_dir():
        os.chdir(args.folder)
    try:
        spec = args.spec
        torch.set_num_threads(spec.workers.cpus)
        with _stop_requests(args.coordinator) if rank == 0 else nullcontext():
            run = open_run(args.store, spec.name)
            kinds.run(spec, _context(args, run, rank, attempt))
    except PreemptedError as error:
        if ray.get(args.coordinator.read.remote()).stop is not None:
            ray.get(args.coordinator.fail.remote(error))
        # Ray treats this as a failure. If the worker's own machine is taken away, it then starts another worker group.
        raise PoiseError(str(error)) from None
    except PoiseError as error:
        ray.get(args.coordinator.fail.remote(error, rank))
        if not _have_all_failed(args.coordinator, context.get_world_size()):
            raise


def _have_all_failed(coordinator: Any, world_size: int) -> bool:
    """Whether every worker records a PoiseError within a few seconds."""
    deadline = time.monotonic() + _ALL_FAIL_WITHIN_S
    while ray.get(coordinator.num_failed.remote()) < world_size:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def _stop_requests(coordinator: Any) -> Iterator[None]:
    """While the block runs, poll the coordinator and pass a request to stop on to this process."""
    done = threading.Event()

    def poll() -> None:
        while not done.wait(_POLL_EVERY_S):
            if reason := ray.get(coordinator.read.remote()).stop:
                PROCESS.request(reason)
                if not PROCESS.is_deferred:  # no step is under way that would be committed
                    coordinator.fail.remote(PROCESS.error("stopped at the last commit"))
                return

    thread = threading.Thread(target=poll, name="stop requests", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def _context(args: WorkerArgs, run: Run, rank: int, attempt: int) -> Context:
    """The context of this worker: its rank and device, and functions that report to the coordinator."""

    def show(progress: Progress) -> None:
        args.coordinator.show.remote(progress)

    def check_lease() -> None:
        if not Lease.holds(run.storage, run.name, args.token):
            raise RunBusyError(
                f"run {run.name}: another driver has taken it over; this one stops before its next commit"
            )

    def sampler(spec: SamplerSpec, folder: Path) -> SamplerPool:
        return SamplerPool(spec, folder, owner=args.coordinator, on_restart=record_restart)

    def record_restart(why: str) -> None:
        sink.inc("poise_sampler_restarts_total", run=run.name)
        run.append_events([event("sampler_restart", why=why)])

    sink = RaySink()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL allocates its buffers on the current device
    return Context(
        run=run,
        rank=rank,
        world_size=ray.train.get_context().get_world_size(),
        device=device,
        attempt=attempt,
        report=show,
        sampler=sampler,
        check_lease=check_lease,
        sink=sink,
    )
