"""The registry of kinds, one line each, and the kinds that installed packages register in the group `poise.kinds`.

The modules of a kind of Poise are imported when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from poise import plugins
from poise.errors import UserError
from poise.spec import RunSpec
from poise.user_code import describe_error, explain_user_frames

if TYPE_CHECKING:
    from poise.report.blocks import RenderedFigure, Section, Table
    from poise.report.record import RunRecord
    from poise.store.result import RunResult
    from poise.train.context import Context

__all__ = ["REGISTRY", "Kind", "failures", "is_installed", "load_result", "load_run", "load_section"]


@dataclass(frozen=True)
class Kind:
    """One kind of run, in a package with the modules `spec`, `run`, `result` and `report`, or all in one module.

    Attributes:
        package: the package, or the module.
        spec_class: the class of its specs, in `spec`.
        result_class: the class of its results, in `result`; None for a kind without `result` and `report`.
        is_job: whether `run` has a function `run(spec, context)`. From a spec of another kind the engine makes jobs.
    """

    package: str
    spec_class: str
    result_class: str | None
    is_job: bool = True

    @property
    def spec(self) -> type[RunSpec]:
        """The class that validates a spec of this kind."""
        spec_class: type[RunSpec] = getattr(self._module("spec"), self.spec_class)
        return spec_class

    @property
    def run(self) -> Callable[[RunSpec, Context], None]:
        """The function that runs a job of this kind in this worker and leaves its results in the store."""
        run: Callable[[RunSpec, Context], None] = self._module("run").run
        return run

    @property
    def result(self) -> type[RunResult]:
        """The class of the results of this kind, which must have results."""
        assert self.result_class is not None  # callers check it
        result_class: type[RunResult] = getattr(self._module("result"), self.result_class)
        return result_class

    @property
    def section(self) -> Section | None:
        """The report section of this kind; None for a kind in one module without one. Imports matplotlib."""
        section: Section | None = getattr(self._module("report"), "SECTION", None)
        return section

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that a run executes. `report` is none of them: a page may be rendered again at any time."""
        names = ["spec", "run", "result"] if self.result_class else ["spec", "run"]
        is_package = hasattr(import_module(self.package), "__path__")
        return tuple(f"{self.package}.{name}" for name in names) if is_package else (self.package,)

    def _module(self, name: str) -> Any:
        package = import_module(self.package)
        return import_module(f"{self.package}.{name}") if hasattr(package, "__path__") else package


_GROUP = "poise.kinds"

_OWN_KINDS: Mapping[str, Kind] = {
    "robust.train": Kind("poise.kinds.robust_train", "RobustTrainSpec", "RobustTrainResult"),
    "robust.evaluate": Kind("poise.kinds.robust_evaluate", "RobustEvaluateSpec", "RobustEvaluateResult"),
    "robust.vae": Kind("poise.kinds.robust_vae", "RobustVaeSpec", "RobustVaeResult"),
    "robust.manifold": Kind("poise.kinds.robust_manifold", "RobustManifoldSpec", "RobustManifoldResult"),
    "bounds.report": Kind("poise.kinds.bounds_report", "BoundsReportSpec", "BoundsReportResult"),
    "finetune.sft": Kind("poise.kinds.finetune_sft", "FinetuneSftSpec", "FinetuneSftResult"),
    "align.selfplay": Kind("poise.kinds.align_selfplay", "AlignSelfplaySpec", "AlignSelfplayResult"),
    "calibrate.measure": Kind("poise.kinds.calibrate_measure", "CalibrateMeasureSpec", "CalibrateMeasureResult"),
    "sweep": Kind("poise.kinds.sweep", "SweepSpec", "SweepResult", is_job=False),
    "pipeline": Kind("poise.kinds.pipeline", "PipelineSpec", None, is_job=False),
}


class _Registry(Mapping[str, Kind]):
    """The kinds of Poise, then those that installed packages register, which are imported when they are looked up.

    Iteration leaves out kinds that cannot be used. Looking one up raises UserError.
    """

    def __getitem__(self, name: str) -> Kind:
        return _OWN_KINDS[name] if name in _OWN_KINDS else _installed_kind(name)

    def __iter__(self) -> Iterator[str]:
        yield from _OWN_KINDS
        for name in plugins.names(_GROUP):
            with suppress(UserError):
                _installed_kind(name)
                if name not in _OWN_KINDS:
                    yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _installed_kind(name: str) -> Kind:
    """The kind that an installed package registers under this name.

    Raises:
        KeyError: no package does.
        UserError: it cannot be used.
    """
    kind = plugins.load(_GROUP, name)
    if not isinstance(kind, Kind):
        what = type(kind).__name__
        raise UserError(f"the kind {name!r} of an installed package is a {what}, not a poise.kinds.registry.Kind")
    try:
        spec_class = kind.spec
    except Exception as error:
        raise UserError(f"the spec of the kind {name!r} cannot be imported: {describe_error(error)}") from error
    if not (isinstance(spec_class, type) and issubclass(spec_class, RunSpec)):
        raise UserError(f"{kind.package}.{kind.spec_class}, the spec of the kind {name!r}, is not a poise.spec.RunSpec")
    return kind


REGISTRY: Mapping[str, Kind] = _Registry()
"""All kinds, by name."""


def is_installed(name: str) -> bool:
    """Whether an installed package registers this kind, which is not one of Poise."""
    return name not in _OWN_KINDS and name in plugins.names(_GROUP)


def load_run(name: str) -> Callable[[RunSpec, Context], None]:
    """The function that runs a job of a kind.

    Raises:
        KeyError: there is no such kind.
        UserError: it belongs to an installed package and cannot be loaded.
    """
    kind = REGISTRY[name]
    with _named(name, f"{kind.package}, the code of the kind {name!r},"):
        run = kind.run
    if not callable(run):
        raise UserError(f"`run` of {kind.package}, the code of the kind {name!r}, is not a function")
    return run


def load_result(name: str) -> type[RunResult] | None:
    """The class of the results of a kind; None for a kind without results. Raises as `load_run`."""
    kind = REGISTRY[name]
    if kind.result_class is None:
        return None
    what = f"{kind.package}.{kind.result_class}, the result of the kind {name!r},"
    with _named(name, what):
        result_class = kind.result
    from poise.store.result import RunResult

    if not (isinstance(result_class, type) and issubclass(result_class, RunResult)):
        raise UserError(f"{what} is not a poise.store.result.RunResult")
    return result_class


def load_section(name: str) -> Section | None:
    """The report section of a kind; None for a kind without results or without one. Raises as `load_run`."""
    kind = REGISTRY[name]
    if kind.result_class is None:
        return None
    what = f"the report of the kind {name!r}, in {kind.package},"
    with _named(name, what):
        section = kind.section
    if section is None or not is_installed(name):
        return section
    from poise.report.blocks import Section

    if not isinstance(section, Section):
        raise UserError(f"SECTION of {what} is not a poise.report.blocks.Section")
    return _explained(section, f"the report of the kind {name!r}")


def failures() -> Iterator[str]:
    """A message for every part of a kind of an installed package that cannot be used. Imports all of these kinds.

    An entry point that cannot be loaded at all is left to `plugins.failures`.
    """
    for name in filter(is_installed, plugins.names(_GROUP)):
        try:
            plugins.load(_GROUP, name)
        except UserError:
            continue
        for load in (_installed_kind, load_run, load_result, load_section):
            try:
                load(name)
            except UserError as error:
                yield f"{_GROUP} {name!r}: {error}"
                if load is _installed_kind:
                    break


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """Turn an error of the block into a UserError that begins with `what`, if the kind is of an installed package."""
    try:
        yield
    except Exception as error:
        if not is_installed(name):
            raise  # such as a package that is not installed with Poise
        raise UserError(f"{what} cannot be loaded: {describe_error(error)}") from error


_T = TypeVar("_T")


def _explained(section: Section, what: str) -> Section:
    """The section with its errors turned into UserErrors that name `what`."""

    def collect(parts: Callable[[], Iterable[_T]]) -> list[_T]:
        with explain_user_frames(what, plugins.top_levels()):
            return list(parts())  # a generator raises only when it is iterated

    def tables(records: Sequence[RunRecord]) -> Iterable[Table]:
        return collect(lambda: section.tables(records))

    def rendered_figures(records: Sequence[RunRecord]) -> Iterable[RenderedFigure | None]:
        return collect(lambda: section.rendered_figures(records))

    def details(anchor: str, record: RunRecord) -> Iterable[RenderedFigure | None]:
        return collect(lambda: section.details(anchor, record))

    return replace(section, tables=tables, rendered_figures=rendered_figures, details=details)
