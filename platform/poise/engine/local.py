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
from poise.engine.lifecycle import claim, is_finished, located
from poise.engine.network import use_interface_towards
from poise.engine.torchrun import check_launcher, for_processes
from poise.env import launched_rank
from poise.errors import UserError
from poise.inference.sampler import Sampler
from poise.observe.progress import Display
from poise.observe.sinks import Sink, series_of
from poise.spec import RunSpec, SamplerSpec
from poise.train.context import Context

__all__ = ["check_device", "run_local"]


def run_local(spec: RunSpec, display: Display, sink: Sink) -> None:
    """Run `spec` to its end in this process, from its last commit if it has one. Does nothing for a finished run."""
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
        if context.on_main(lambda: is_finished(context.run, spec)):
            return

        stack.enter_context(series_of(sink, spec.name))

        def claim_here() -> None:
            context.check_lease = stack.enter_context(claim(context.run, spec, display.note)).check

        context.on_main(claim_here)
        kinds.run(spec, context)


@cache
def _rendezvous_store() -> Any:
    """The store through which the processes of torchrun exchange their addresses; opened once per process."""
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    return store


def _join(backend: str, name: str) -> None:
    """Join the process group of the run `name`.

    One process runs the stages of a pipeline or the trials of a sweep one after the other. Each run has a group with
    its own prefix in the store: with a common prefix a process would read the addresses of the run before, and wait for
    ever.
    """
    rank, world_size, _ = launched_rank()
    store = dist.PrefixStore(name, _rendezvous_store())  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _use_interface() -> None:
    """If torchrun spans several machines, use the network interface that reaches MASTER_ADDR."""
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE") and "MASTER_ADDR" in os.environ:
        use_interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


@contextmanager
def _sampler(device: torch.device, spec: SamplerSpec, folder: Path) -> Iterator[Sampler]:
    """A transformers sampler in this process; UserError for vLLM engines, which need Ray."""
    if spec.backend == "vllm":
        raise UserError(
            "vLLM engines run beside the workers of a Ray cluster: use --engine ray, or "
            "--set sampler.backend=transformers to sample in this process"
        )
    from poise.inference.transformers_sampler import TransformersSampler

    yield TransformersSampler(folder, device, dtype=spec.dtype)


def check_device(spec: RunSpec) -> None:
    """UserError when `spec` asks for GPUs and this process has none."""
    if spec.workers.gpus == 0:
        return
    if not torch.cuda.is_available():
        raise UserError("workers.gpus is 1 and torch sees no GPU here; use --set workers.gpus=0")
    local_rank = launched_rank()[2]
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own, there are {num_gpus}: start as many "
            "processes with torchrun, or use --set workers.gpus=0"
        )


def _device(spec: RunSpec) -> torch.device:
    """The device of this process, made the current one if it is a GPU."""
    check_device(spec)
    if spec.workers.gpus == 0:
        return torch.device("cpu")
    device = torch.device("cuda", launched_rank()[2])
    torch.cuda.set_device(device)
    return device
