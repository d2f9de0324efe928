"""The whole spec of each kind, put together from the sections of the rooms. No heavy import: `poise check` reads it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from poise.data.spec import DataSpec
from poise.models.spec import ModelSpec
from poise.robust.spec import Adt, EvaluateSpec, Objective, Threats, check
from poise.spec import Name, RunSpec, mistake
from poise.spec.problems import Path
from poise.train.spec import TrainSpec

__all__ = ["PipelineSpec", "RobustTrainSpec"]


class RobustTrainSpec(RunSpec):
    """Adversarial training of an image classifier under one or several norms, and its evaluation under attack."""

    kind: Literal["robust.train"]
    model: ModelSpec = Field(description="architecture")
    data: DataSpec = Field(description="data set, batches and augmentation")
    threats: Threats = Field(description="attacks that the network is trained under, by norm")
    objective: Objective = Field(Adt(), description="how the losses under the attacks become one")
    train: TrainSpec = Field(description="length, optimizer, schedule, checkpoints")
    evaluate: EvaluateSpec = Field(EvaluateSpec(), description="attacks that the trained network is measured under")

    @model_validator(mode="after")
    def _fits(self) -> RobustTrainSpec:
        try:
            check(self.objective, self.threats)
        except ValueError as error:
            raise mistake("threats", str(error)) from None
        for count in range(self.workers.min_count or self.workers.count, self.workers.count + 1):
            if self.data.batch_size % count:
                raise mistake("data.batch_size", f"{self.data.batch_size} does not divide by {count} workers")
        return self


class PipelineSpec(RunSpec):
    """Stages that are run in order, each a run of its own; stages that are finished are skipped."""

    kind: Literal["pipeline"]
    stages: dict[Name, RobustTrainSpec] = Field(min_length=1, max_length=100, description="the runs, by name, in order")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> tuple[dict[str, Any], dict[Path, Path]]:
        """Give each stage what it does not say itself: `common`, and name, seed, store and workers of the pipeline."""
        stages, common = tree.get("stages"), tree.get("common", {})
        if not isinstance(stages, dict) or not isinstance(common, dict):
            return tree, {}
        head: dict[str, Any] = {key: tree[key] for key in ("seed", "store", "workers") if key in tree}
        full = {
            stage: _overlay({**head, "name": f"{tree.get('name')}-{stage}"}, common, body)
            if isinstance(body, dict)
            else body
            for stage, body in stages.items()
        }
        rest = {key: value for key, value in tree.items() if key != "common"}
        copies: dict[Path, Path] = {("stages", stage): ("common",) for stage in stages}
        return {**rest, "stages": full}, copies

    @model_validator(mode="after")
    def _own_names(self) -> PipelineSpec:
        names = [stage.name for stage in self.stages.values()]
        if len(set(names)) < len(names):
            raise ValueError("two stages have the same run name; leave `name` out of `common`")
        return self


def _overlay(*layers: dict[str, Any]) -> dict[str, Any]:
    """Mappings laid over each other, section by section; the last that says something wins."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = _overlay(result[key], value) if both else value
    return result
