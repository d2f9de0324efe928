"""From a spec to its runs: one run, the trials of a sweep, the stages of a pipeline in order, on an engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Literal

from poise import env
from poise.engine.auth import ensure_token
from poise.engine.launched import check_launcher, for_processes
from poise.engine.network import cluster_address, is_on_loopback_alone
from poise.engine.session import claim, has_committed, is_finished, located
from poise.engine.sweep import Execute, in_turn, is_concluded, run_sweep
from poise.env import launched_rank
from poise.errors import UserError
from poise.kinds.specs.pipeline import PipelineSpec
from poise.kinds.specs.sweep import SweepSpec
from poise.observe.progress import Display
from poise.observe.sinks import Sink
from poise.report.record import when
from poise.spec import RunSpec, SamplerSpec
from poise.spec.code import own_code
from poise.store.inputs import check_inputs
from poise.train.preemption import PROCESS

__all__ = ["Engine", "drive", "prepare_ray", "stages_of"]

Engine = Literal["ray", "local"]
_RunOne = Callable[[RunSpec, Display, Sink], None]


def stages_of(spec: RunSpec) -> list[RunSpec]:
    """The runs that `spec` asks for, in order."""
    return list(spec.stages.values()) if isinstance(spec, PipelineSpec) else [spec]


def drive(spec: RunSpec, engine: Engine, address: str | None, display: Display, sink: Sink) -> None:
    """Bring every run of `spec` to its end; what is finished already is skipped, and said to be.

    Raises:
        UserError: a run that was begun with another spec, or with other inputs than there are now; under `torchrun`,
            processes that cannot share every run equally.
    """
    check_launcher(engine)
    spec = for_processes(spec, launched_rank()[1])
    left = [stage for stage in stages_of(spec) if not _was_finished(stage, display)]
    if not left:
        return
    for stage in left:
        _check_engine(engine, stage)
    with PROCESS.handled(), _opened(engine, address, left, display) as run_one, PROCESS.handled():  # Ray takes SIGTERM
        if isinstance(spec, PipelineSpec):
            with claim(located(spec), spec, display.note) if launched_rank()[0] == 0 else nullcontext():
                for stage in left:
                    run_one(stage, display, sink)
        else:
            run_one(spec, display, sink)


def _check_engine(engine: Engine, spec: RunSpec) -> None:
    """UserError for what the engine cannot do, while no name is claimed yet."""
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


def _was_finished(spec: RunSpec, display: Display) -> bool:
    """Whether nothing is left of a run; that nothing is run then is said."""
    run = located(spec)
    finished = is_concluded(run, spec) if isinstance(spec, SweepSpec) else is_finished(run, spec)
    if finished or has_committed(spec):
        check_inputs(run, spec)
    if not finished:
        return False
    manifest = run.manifest()
    assert manifest is not None  # of a finished run
    if launched_rank()[0] == 0:
        display.note(f"[{spec.name}] finished at {when(manifest.updated)} UTC; nothing was run")
    return True


@contextmanager
def _opened(engine: Engine, address: str | None, left: Sequence[RunSpec], display: Display) -> Iterator[_RunOne]:
    bases = [stage.base if isinstance(stage, SweepSpec) else stage for stage in left]
    if engine == "local":
        from poise.engine.local import check_device, run_local

        for base in bases:
            check_device(base)
        yield _runner(run_local, in_turn)
        return
    if find_spec("ray") is None:
        raise UserError("ray is not installed here; use --engine local, or install poise with its dependencies")
    prepare_ray(address)
    from poise.engine.gang import check_resources, cluster, run_gang
    from poise.engine.trials import by_tune

    with cluster(address, bases, own_code(left, lenient=True)) as private:
        for base in bases:
            check_resources(base, display, private=private)
        yield _runner(partial(run_gang, private=private), by_tune)


def prepare_ray(address: str | None) -> None:
    """What has to be said before ray is imported: whether the cluster is of this machine alone, and its token.

    A cluster for this command alone is one, and its token is made before it starts.
    """
    joined = cluster_address(address)
    if joined is None:
        ensure_token()
    if "ray" not in sys.modules and (joined is None or is_on_loopback_alone(joined)):
        for name, value in env.LOOPBACK_ALONE.items():
            os.environ.setdefault(name, value)


def _runner(run_one: _RunOne, execute: Execute) -> _RunOne:
    def run(spec: RunSpec, display: Display, sink: Sink) -> None:
        if isinstance(spec, SweepSpec):
            run_sweep(spec, display, sink, execute)
        else:
            run_one(spec, display, sink)

    return run
