"""What runs in each worker of a Ray Train gang: it makes the context, and runs the kind in it."""

from __future__ import annotations

import os
import threading
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
from poise.engine.errand import Errand
from poise.engine.metrics import RaySink
from poise.engine.pool import SamplerPool
from poise.errors import PoiseError, PreemptedError, RunBusyError
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.spec import SamplerSpec
from poise.store.lease import Lease
from poise.store.runs import Run, open_run
from poise.train.context import Context
from poise.train.preemption import PROCESS

__all__ = ["work"]

_LOOK_EVERY_S = 1.0


def work(errand: Errand) -> None:
    """Run the errand as one worker of the gang.

    A PoiseError is put on the board before it is raised: the gang that Ray starts next then ends at once, since no
    restart mends a malformed data set or a loss that is not finite.
    """
    rank = ray.train.get_context().get_world_rank()
    attempt, is_over = ray.get(errand.board.begin.remote(rank, get_current_placement_group()))
    if is_over:
        return
    if Path(errand.folder).is_dir():
        os.chdir(errand.folder)
    spec = kinds.KINDS[errand.kind].model_validate_json(errand.spec_json)
    torch.set_num_threads(spec.workers.cpus)
    try:
        with _told_to_stop(errand.board) if rank == 0 else nullcontext():
            kinds.run(spec, _context(errand, open_run(errand.store, spec.name), rank, attempt))
    except PreemptedError as error:
        if ray.get(errand.board.read.remote()).stop is not None:
            ray.get(errand.board.fail.remote(error))
        raise PoiseError(str(error)) from None  # a worker that was taken away itself: Ray starts another gang
    except PoiseError as error:
        ray.get(errand.board.fail.remote(error))
        raise


@contextmanager
def _told_to_stop(board: Any) -> Iterator[None]:
    """Look on the board, for as long as the block lasts, whether the driver was asked to end."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_EVERY_S):
            if reason := ray.get(board.read.remote()).stop:
                PROCESS.request(reason)
                if not PROCESS.is_deferred:  # nothing goes on that would commit more
                    board.fail.remote(PROCESS.error("stopped at the last commit"))
                return

    thread = threading.Thread(target=look, name="told to stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _context(errand: Errand, run: Run, rank: int, attempt: int) -> Context:
    def show(progress: Progress) -> None:
        errand.board.show.remote(progress)

    def guard() -> None:
        if not Lease.holds(run.storage, run.name, errand.token):
            raise RunBusyError(
                f"run {run.name}: another driver has taken it over; this one stops before its next commit"
            )

    def sampler(spec: SamplerSpec, folder: Path) -> SamplerPool:
        return SamplerPool(spec, folder, keeper=errand.board, on_restart=restarted)

    def restarted(why: str) -> None:
        sink.inc("poise_sampler_restarts_total", run=run.name)
        run.append_events([event("sampler_restart", why=why)])

    sink = RaySink()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL puts what it sends
    return Context(
        run=run,
        rank=rank,
        world_size=ray.train.get_context().get_world_size(),
        device=device,
        attempt=attempt,
        report=show,
        sampler=sampler,
        guard=guard,
        sink=sink,
    )
