"""The registry of kinds, one line each, and the kinds that installed packages register in the group `poise.kinds`.

The modules of a kind of Poise are imported when they are first used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from poise import plugins
from poise.errors import UserError
from poise.spec import RunSpec
from poise.user_code import describe_error

if TYPE_CHECKING:
    from poise.report.blocks import Section
    from poise.store.result import RunResult
    from poise.train.context import Context

__all__ = ["REGISTRY", "Kind"]


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

    def run(self, spec: RunSpec, context: Context) -> None:
        """Run a job of this kind in this worker and leave its results in the store."""
        self._module("run").run(spec, context)

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
