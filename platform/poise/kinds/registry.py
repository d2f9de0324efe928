"""The registry of kinds, one line each. The modules of a kind are imported when they are first used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from poise.spec import RunSpec

if TYPE_CHECKING:
    from poise.report.blocks import Section
    from poise.store.result import RunResult
    from poise.train.context import Context

__all__ = ["REGISTRY", "Kind"]


@dataclass(frozen=True)
class Kind:
    """One kind of run, in a package with the modules `spec`, `run`, `result` and `report`.

    Attributes:
        package: the package.
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
    def section(self) -> Section:
        """The report section of this kind. Imports matplotlib."""
        section: Section = self._module("report").SECTION
        return section

    def _module(self, name: str) -> Any:
        return import_module(f"{self.package}.{name}")


REGISTRY: Mapping[str, Kind] = {
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
