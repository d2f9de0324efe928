"""What a driver does round a run, on whatever engine: claim it, record where it came from, and say how it ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from poise.errors import PoiseError, PreemptedError
from poise.kinds.specs.pipeline import PipelineSpec
from poise.kinds.specs.sweep import SweepSpec
from poise.observe.environment import environment
from poise.observe.events import event
from poise.secrets import redact
from poise.spec import RunSpec, dump
from poise.store.inputs import has_results, record_inputs
from poise.store.lease import Lease
from poise.store.runs import Run, open_run

__all__ = ["absolute_store", "claim", "has_committed", "identity", "is_finished", "located"]


def located(spec: RunSpec) -> Run:
    """The run of a spec in its store."""
    return open_run(spec.store, spec.name)


def is_finished(run: Run, spec: RunSpec) -> bool:
    """True when the run has ended well and there is nothing left to do; UserError when it had another spec."""
    known = run.manifest()
    if known is None or known.status != "finished":
        return False
    run.claim_spec(dump(spec), identity(spec))
    return True


def identity(spec: RunSpec) -> str:
    """What makes two specs the same experiment: everything but where its runs are kept and how many workers do it.

    The same goes for the specs inside: the stages of a pipeline, the base of a sweep. By what the trials of a sweep are
    judged, and how many are drawn, may change under its name: its trials are runs of their own, and stay.
    """
    return hashlib.sha256(json.dumps(_without_place(spec.model_dump(mode="json"))).encode()).hexdigest()


def _without_place(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    left_out: tuple[str, ...] = ("store", "workers") if "kind" in tree else ()
    if tree.get("kind") == "sweep":
        left_out += ("concurrent", "metric", "mode", "scheduler")
        tree = {**tree, "search": {**tree["search"], "samples": None}}
    return {key: _without_place(value) for key, value in tree.items() if key not in left_out}


def absolute_store(spec: RunSpec) -> str:
    """The store of a spec as a worker in another folder finds it."""
    return spec.store if "://" in spec.store else str(Path(spec.store).expanduser().absolute())


@contextmanager
def claim(run: Run, spec: RunSpec, note: Callable[[str], None] | None = None) -> Iterator[Lease]:
    """Hold the run for this driver. On leaving, the manifest says `finished`, or `failed` and why; Ctrl-C leaves it.

    `note` shows a line where it takes long to read what the run depends on.

    Raises RunBusyError when another driver holds it and UserError when the stored run has another spec, or was begun
    with other inputs than there are now.
    """
    with run.lease() as lease:
        run.claim_spec(dump(spec), identity(spec))
        record_inputs(run, spec, committed=has_committed(spec), lenient=True, note=note)
        run.start(spec.kind, identity(spec))
        run.write("environment.json", json.dumps(environment(), indent=1).encode())
        try:
            yield lease
        except KeyboardInterrupt as error:
            with suppress(PoiseError):
                lease.check()
                run.append_events([event("preempted" if isinstance(error, PreemptedError) else "interrupted")])
            raise
        except Exception as error:
            with suppress(PoiseError):  # a full disk, or a lost lease, must not hide what went wrong first
                lease.check()
                why = redact(str(error)) or type(error).__name__
                run.append_events([event("failed", why=why)])
                run.finish("failed", error=why)
            raise
        lease.check()
        summary = _summary(run)
        run.finish("finished", final_step=summary.get("step"), best_step=summary.get("best_step"))


def has_committed(spec: RunSpec) -> bool:
    """Whether the run, or one that it consists of, has left anything that its inputs have gone into."""
    present: dict[str, set[str]] = {}  # names in each store: a sweep of a thousand trials is not asked for one by one
    for each in _runs_of(spec):
        run = located(each)
        if each.store not in present:
            present[each.store] = set(run.storage.folders())
        if each.name in present[each.store] and has_results(run):
            return True
    return False


def _runs_of(spec: RunSpec) -> Iterator[RunSpec]:
    """The run itself, and those that it consists of."""
    yield spec
    if isinstance(spec, SweepSpec):
        yield from (trial.spec for trial in spec.trials())
    if isinstance(spec, PipelineSpec):
        for stage in spec.stages.values():
            yield from _runs_of(stage)


def _summary(run: Run) -> dict[str, Any]:
    try:
        return dict(json.loads(run.read("artifacts/summary.json")))
    except FileNotFoundError:
        return {}
