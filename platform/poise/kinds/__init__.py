"""The kinds of runs: one folder per kind, which binds spec, data, model, training loop and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from poise.kinds.registry import REGISTRY
from poise.observe.terminal import plain_warnings
from poise.spec import RunSpec
from poise.store.inputs import record_inputs
from poise.store.result import RunResult, read_result
from poise.store.runs import Run
from poise.user_code import current_folder_first, explain_user_frames, is_code_allowed

if TYPE_CHECKING:
    from poise.report.blocks import Section
    from poise.train.context import Context

__all__ = ["KINDS", "read_any_result", "report_sections", "result_classes", "run"]


class _SpecClasses(Mapping[str, type[RunSpec]]):
    """The class of the specs of each kind, imported when it is first asked for: the classes of methods need torch."""

    def __getitem__(self, kind: str) -> type[RunSpec]:
        return REGISTRY[kind].spec

    def __iter__(self) -> Iterator[str]:
        return iter(REGISTRY)

    def __len__(self) -> int:
        return len(REGISTRY)


KINDS: Mapping[str, type[RunSpec]] = _SpecClasses()
"""The class of the specs of each kind, by name."""


@cache
def report_sections() -> Mapping[str, Section]:
    """The report section of each kind that has results, by name. Imports matplotlib."""
    sections = {name: kind.section for name, kind in REGISTRY.items() if kind.result_class}
    return {name: section for name, section in sections.items() if section is not None}


@cache
def result_classes() -> Mapping[str, type[RunResult]]:
    """The result class of each kind that has results, by name."""
    return {name: kind.result for name, kind in REGISTRY.items() if kind.result_class}


def read_any_result(run: Run) -> RunResult | None:
    """The result of a run of any kind; None where it has none yet.

    Raises:
        IntegrityError: `result.json` is damaged.
    """
    manifest = run.manifest()
    kind = None if manifest is None else REGISTRY.get(manifest.kind)
    if kind is None or kind.result_class is None:
        return None
    return read_result(run, kind.result)


def run(spec: RunSpec, context: Context) -> None:
    """Run `spec` in this worker and leave its results in the store. Every worker of the group calls it.

    Rank 0 first compares the inputs with those that the run recorded at its first start, because a restarted worker may
    see other files than the one before it.

    Raises:
        UserError: an input has changed since the run began, or code of the user failed; see `explain_user_frames`.
    """
    context.on_main(lambda: record_inputs(context.run, spec))
    with plain_warnings(), _user_code():
        REGISTRY[spec.kind].run(spec, context)


@contextmanager
def _user_code() -> Iterator[None]:
    """Where code of the user may run, explain its errors while the block runs, and find what it imports late."""
    if not is_code_allowed():
        yield
        return
    with current_folder_first(), explain_user_frames():
        yield
