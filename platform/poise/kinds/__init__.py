"""The kinds of runs: one folder per kind, which binds spec, data, model, training loop and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from poise import plugins
from poise.errors import UserError
from poise.kinds.registry import REGISTRY, is_installed, load_result, load_run, load_section
from poise.observe.terminal import plain_warnings
from poise.spec import RunSpec, all_inputs
from poise.store.inputs import record_inputs
from poise.store.result import RunResult, has_result, read_result
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


_T = TypeVar("_T")


class _Parts(Mapping[str, _T]):
    """One part of each kind, imported when it is first asked for: a kind that is broken breaks no other.

    Looking up a part that cannot be loaded raises UserError. Iteration leaves it out.
    """

    def __init__(self, load: Callable[[str], _T | None]) -> None:
        self._load = cache(load)

    def __getitem__(self, kind: str) -> _T:
        part = self._load(kind)
        if part is None:
            raise KeyError(kind)
        return part

    def __iter__(self) -> Iterator[str]:
        for kind in REGISTRY:
            try:
                part = self._load(kind)
            except UserError:
                continue
            if part is not None:
                yield kind

    def __len__(self) -> int:
        return sum(1 for _ in self)


def report_sections() -> Mapping[str, Section]:
    """The report section of each kind that has results, by name. Imports matplotlib."""
    return _Parts(load_section)


def result_classes() -> Mapping[str, type[RunResult]]:
    """The result class of each kind that has results, by name."""
    return _Parts(load_result)


def read_any_result(run: Run) -> RunResult | None:
    """The result of a run of any kind; None where it has none yet.

    Raises:
        IntegrityError: `result.json` is damaged.
    """
    manifest = run.manifest()
    result_class = None if manifest is None else result_classes().get(manifest.kind)
    return None if result_class is None else read_result(run, result_class)


def run(spec: RunSpec, context: Context) -> None:
    """Run `spec` in this worker and leave its results in the store. Every worker of the group calls it.

    Rank 0 first compares the inputs with those that the run recorded at its first start, because a restarted worker may
    see other files than the one before it.

    Raises:
        UserError: an input has changed since the run began; code of the user or of an installed package failed, see
            `explain_user_frames`; or the kind has left no result.
    """
    context.on_main(lambda: record_inputs(context.run, spec))
    run_kind = load_run(spec.kind)
    has_results = load_result(spec.kind) is not None  # a class that cannot be loaded ends the run before it begins
    with plain_warnings(), _user_code(spec):
        run_kind(spec, context)
    if has_results and context.is_main and not has_result(context.run):
        raise UserError(
            f"the kind {spec.kind!r} has left no result: its `run` has to end with "
            "`context.on_main(lambda: write_result(context.run, result))`, see poise.store.result.write_result"
        )


@contextmanager
def _user_code(spec: RunSpec) -> Iterator[None]:
    """Where code of the user or of an installed package may run, explain its errors, and find what it imports late."""
    if is_code_allowed():
        with current_folder_first(), explain_user_frames(packages=plugins.top_levels()):
            yield
    elif any(each.kind == "plugin" for each in all_inputs(spec)):
        what = f"the kind {spec.kind!r}" if is_installed(spec.kind) else "code of an installed package"
        with explain_user_frames(what, plugins.top_levels()):
            yield
    else:
        yield
