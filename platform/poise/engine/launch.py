"""Runs a spec on an engine: one run, the trials of a sweep, or the stages of a pipeline in order."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Literal

from poise import env
from poise.engine.lifecycle import (
    claim,
    has_committed,
    is_finished,
    located,
)
from poise.engine.network import cluster_address, is_on_loopback_alone
from poise.engine.ray.auth import ensure_token
from poise.engine.sweep import Execute, is_concluded, run_sweep, run_trials_in_turn
from poise.engine.torchrun import check_launcher, for_processes
from poise.env import launched_rank
from poise.errors import UserError
from poise.kinds.code import named_code
from poise.kinds.pipeline.spec import PipelineSpec
from poise.kinds.sweep.spec import SweepSpec
from poise.observe.progress import Display
from poise.observe.sinks import Sink
from poise.report.record import when
from poise.spec import RunSpec, SamplerSpec
from poise.spec.code import own_code
from poise.store.inputs import check_inputs
from poise.train.preemption import PROCESS

__all__ = ["Engine", "launch", "prepare_ray", "stages_of"]

Engine = Literal["ray", "local"]
_RunOne = Callable[[RunSpec, Display, Sink], None]


def stages_of(spec: RunSpec) -> list[RunSpec]:
    """The runs that `spec` asks for, in order."""
    return list(spec.stages.values()) if isinstance(spec, PipelineSpec) else [spec]


def launch(spec: RunSpec, engine: Engine, address: str | None, display: Display, sink: Sink) -> None:
    """Run every run of `spec` to its end. A run that is finished already is skipped with a note.

    Raises:
        UserError: a run that was begun with another spec, or with other inputs than there are now; under `torchrun`,
            processes that cannot share every run equally.
    """
    check_launcher(engine)
    spec = for_processes(spec, launched_rank()[1])
    remaining = [stage for stage in stages_of(spec) if not _skip_finished(stage, display)]
    if not remaining:
        return
    for stage in remaining:
        _check_engine(engine, stage)
    # The second `handled` because Ray replaces the handler of SIGTERM when it starts.
    with PROCESS.handled(), _open_engine(engine, address, remaining, display) as run_one, PROCESS.handled():
        if isinstance(spec, PipelineSpec):
            with claim(located(spec), spec, display.note) if launched_rank()[0] == 0 else nullcontext():
                for stage in remaining:
                    run_one(stage, display, sink)
        else:
            run_one(spec, display, sink)


def _check_engine(engine: Engine, spec: RunSpec) -> None:
    """UserError for a spec that the engine cannot run. Called before any run is claimed."""
    if engine == "ray":
        return
    if isinstance(spec, SweepSpec) and spec.scheduler.name != "none":
        raise UserError("trials that run one after the other cannot stop each other: use --engine ray, or no scheduler")
    sampler = getattr(spec.base if isinstance(spec, SweepSpec) else spec, "sampler", None)
    if isinstance(sampler, SamplerSpec) and sampler.backend == "vllm":
        raise UserError(
            f"run {spec.name!r}: vLLM engines run beside the workers of a Ray cluster: use --engine ray, or "
            "set sampler.backend to transformers to sample in this process"
        )


def _skip_finished(spec: RunSpec, display: Display) -> bool:
    """Whether a run is finished, which a note then shows. Checks the inputs of a run that has results."""
    run = located(spec)
    finished = is_concluded(run, spec) if isinstance(spec, SweepSpec) else is_finished(run, spec)
    if finished or has_committed(spec):
        check_inputs(run, spec)
    if not finished:
        return False
    manifest = run.manifest()
    assert manifest is not None  # a finished run has one
    if launched_rank()[0] == 0:
        display.note(f"[{spec.name}] finished at {when(manifest.updated)} UTC; nothing was run")
    return True


@contextmanager
def _open_engine(engine: Engine, address: str | None, specs: Sequence[RunSpec], display: Display) -> Iterator[_RunOne]:
    """Start or join the engine while the block runs; yields the function that runs one spec on it."""
    bases = [spec.base if isinstance(spec, SweepSpec) else spec for spec in specs]
    if engine == "local":
        from poise.engine.local import check_device, run_local

        for base in bases:
            check_device(base)
        yield _runner(run_local, run_trials_in_turn)
        return
    if find_spec("ray") is None:
        raise UserError("ray is not installed here; use --engine local, or pip install 'poise[ray]'")
    prepare_ray(address)
    from poise.engine.ray.tune import run_trials_with_tune
    from poise.engine.ray.worker_group import check_resources, cluster, run_worker_group

    references = [code.reference for spec in specs for code in named_code(spec)]
    code = own_code(references, lenient=True)
    with cluster(address, bases, code) as private:
        for base in bases:
            check_resources(base, display, private=private)
        yield _runner(partial(run_worker_group, private=private), run_trials_with_tune)


def prepare_ray(address: str | None) -> None:
    """Set the environment that Ray reads when it is imported.

    Writes the token of a cluster that is started for this command, and keeps a cluster of this machine alone on
    loopback.
    """
    join_address = cluster_address(address)
    if join_address is None:
        ensure_token()
    if "ray" not in sys.modules and (join_address is None or is_on_loopback_alone(join_address)):
        for name, value in env.LOOPBACK_ALONE.items():
            os.environ.setdefault(name, value)


def _runner(run_one: _RunOne, execute: Execute) -> _RunOne:
    """A function that runs a sweep with `execute` and any other spec with `run_one`."""

    def run(spec: RunSpec, display: Display, sink: Sink) -> None:
        if isinstance(spec, SweepSpec):
            run_sweep(spec, display, sink, execute)
        else:
            run_one(spec, display, sink)

    return run
