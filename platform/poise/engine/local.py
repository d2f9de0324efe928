"""`--engine local`: this process, or this process as one rank under `torchrun`. Needs torch and no Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from poise import kinds
from poise.engine.launched import check_launcher, for_processes
from poise.engine.network import use_interface_towards
from poise.engine.session import claim, is_finished, located
from poise.env import launched_rank
from poise.errors import UserError
from poise.models.sampling import Sampler
from poise.observe.progress import Display
from poise.observe.sinks import Sink, series_of
from poise.spec import RunSpec, SamplerSpec
from poise.train.context import Context

__all__ = ["check_device", "run_local"]


def run_local(spec: RunSpec, display: Display, sink: Sink) -> None:
    """Run `spec` to its end here, from where it stopped. A finished run is left as it is."""
    torch.set_num_threads(spec.workers.cpus)
    rank, world_size, _ = launched_rank()
    check_launcher("local")
    spec = for_processes(spec, world_size)
    device = _device(spec)
    context = Context(
        located(spec), rank, world_size, device, report=display.show, sampler=partial(_sampler, device), sink=sink
    )
    with ExitStack() as stack:
        if world_size > 1:
            _use_interface()
            _join("nccl" if device.type == "cuda" else "gloo", spec.name)
            stack.callback(dist.destroy_process_group)
        if context.together(lambda: is_finished(context.run, spec)):
            return

        stack.enter_context(series_of(sink, spec.name))

        def claim_here() -> None:
            context.guard = stack.enter_context(claim(context.run, spec, display.note)).check

        context.together(claim_here)
        kinds.run(spec, context)


@cache
def _meeting_point() -> Any:
    """Where the processes that torchrun has started leave their addresses for each other, once for this process."""
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    return store


def _join(backend: str, name: str) -> None:
    """Enter the process group of one run.

    The stages of a pipeline and the trials of a sweep are many runs of one process. Each has a group, and its addresses
    are left under its name: under one name for all, a process finds those of the run before, and waits for ever.
    """
    rank, world_size, _ = launched_rank()
    store = dist.PrefixStore(name, _meeting_point())  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _use_interface() -> None:
    """Where torchrun spans several machines, talk through the network that joins them."""
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE") and "MASTER_ADDR" in os.environ:
        use_interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


@contextmanager
def _sampler(device: torch.device, spec: SamplerSpec, folder: Path) -> Iterator[Sampler]:
    if spec.backend == "vllm":
        raise UserError(
            "vLLM engines run beside the workers of a Ray cluster: use --engine ray, or "
            "--set sampler.backend=transformers to sample in this process"
        )
    from poise.models.transformers_sampler import TransformersSampler

    yield TransformersSampler(folder, device, dtype=spec.dtype)


def check_device(spec: RunSpec) -> None:
    """UserError when this process has no device such as the workers of `spec` want."""
    if spec.workers.gpus == 0:
        return
    if not torch.cuda.is_available():
        raise UserError("workers.gpus is 1 and torch sees no GPU here; use --set workers.gpus=0")
    place, present = launched_rank()[2], torch.cuda.device_count()
    if place >= present:
        raise UserError(
            f"process {place} of this machine has no GPU of its own, there are {present}: start as many processes "
            "with torchrun, or use --set workers.gpus=0"
        )


def _device(spec: RunSpec) -> torch.device:
    check_device(spec)
    if spec.workers.gpus == 0:
        return torch.device("cpu")
    device = torch.device("cuda", launched_rank()[2])
    torch.cuda.set_device(device)
    return device
