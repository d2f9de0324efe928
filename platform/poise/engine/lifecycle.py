"""What a driver does around a run on every engine: claim it, record its inputs and environment, and record its end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from poise.errors import PoiseError, PreemptedError
from poise.kinds import read_any_result
from poise.kinds.pipeline.spec import PipelineSpec
from poise.kinds.sweep.spec import SweepSpec
from poise.observe.environment import environment
from poise.observe.events import event
from poise.secrets import redact
from poise.spec import RunSpec, dump
from poise.store.inputs import has_results, record_inputs
from poise.store.lease import Lease
from poise.store.runs import Run, open_run

__all__ = ["absolute_store", "claim", "has_committed", "is_finished", "located", "spec_hash"]


def located(spec: RunSpec) -> Run:
    """The run of a spec in its store."""
    return open_run(spec.store, spec.name)


def is_finished(run: Run, spec: RunSpec) -> bool:
    """Whether the run has finished with this spec; UserError when it finished with another one."""
    manifest = run.manifest()
    if manifest is None or manifest.status != "finished":
        return False
    run.check_spec(dump(spec), spec_hash(spec))
    return True


def spec_hash(spec: RunSpec) -> str:
    """The sha256 of every field that makes the experiment: two specs with equal hashes compute the same.

    The store and the workers are not hashed, neither of `spec` nor of the specs in it (the stages of a pipeline, the
    base of a sweep). Of a sweep the judgement and the number of samples are not hashed: they may change under its name,
    since its trials are runs of their own.
    """
    fields = _hashed_fields(spec.model_dump(mode="json"))
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _hashed_fields(tree: Any) -> Any:
    """A dumped spec without the fields that `spec_hash` leaves out."""
    if not isinstance(tree, dict):
        return tree
    excluded: tuple[str, ...] = ("store", "workers") if "kind" in tree else ()
    if tree.get("kind") == "sweep":
        excluded += ("concurrent", "metric", "mode", "scheduler")
        tree = {**tree, "search": {**tree["search"], "samples": None}}
    return {key: _hashed_fields(value) for key, value in tree.items() if key not in excluded}


def absolute_store(spec: RunSpec) -> str:
    """The store of a spec as a URL or an absolute path, for a worker with another working directory."""
    return spec.store if "://" in spec.store else str(Path(spec.store).expanduser().absolute())


@contextmanager
def claim(run: Run, spec: RunSpec, note: Callable[[str], None] | None = None) -> Iterator[Lease]:
    """Hold the lease of the run while the block runs, and record its end.

    The manifest becomes `finished`, or `failed` with the error; after Ctrl-C it stays `running`. `note` shows a line if
    reading the inputs takes long.

    Raises RunBusyError when another driver holds the lease and UserError when the stored run has another spec, or was
    begun with other inputs.
    """
    with run.lease() as lease:
        run.claim_spec(dump(spec), spec_hash(spec))
        record_inputs(run, spec, committed=has_committed(spec), lenient=True, note=note)
        run.start(spec.kind, spec_hash(spec))
        run.write("environment.json", json.dumps(environment(), indent=1).encode())
        try:
            yield lease
        except KeyboardInterrupt as error:
            with suppress(PoiseError):
                lease.check()
                run.append_events([event("preempted" if isinstance(error, PreemptedError) else "interrupted")])
            raise
        except Exception as error:
            with suppress(PoiseError):  # a full disk or a lost lease must not hide the first error
                lease.check()
                why = redact(str(error)) or type(error).__name__
                run.append_events([event("failed", why=why)])
                run.finish("failed", error=why)
            raise
        lease.check()
        result = read_any_result(run)
        run.finish(
            "finished",
            final_step=None if result is None else result.last_step,
            best_step=None if result is None else result.selected_step,
        )


def has_committed(spec: RunSpec) -> bool:
    """Whether the run, or a run that it consists of, has results in the store that depend on its inputs."""
    present: dict[
        str, set[str]
    ] = {}  # names of runs by store: one listing instead of a request for each of many trials
    for each in _runs_of(spec):
        run = located(each)
        if each.store not in present:
            present[each.store] = set(run.storage.folders())
        if each.name in present[each.store] and has_results(run):
            return True
    return False


def _runs_of(spec: RunSpec) -> Iterator[RunSpec]:
    """The spec itself, and those of the runs that it consists of."""
    yield spec
    if isinstance(spec, SweepSpec):
        yield from (trial.spec for trial in spec.trials())
    if isinstance(spec, PipelineSpec):
        for stage in spec.stages.values():
            yield from _runs_of(stage)
