"""`kind: robust.evaluate`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.data.images.spec import DataSpec, known_sizes
from poise.kinds.common.attack_spec import MsdStage, Stage, threat_names
from poise.kinds.common.target_model_spec import TargetModelSpec
from poise.robust.spec import oversized
from poise.spec import Input, MetricSource, RunName, RunSpec, SpecModel, field_error, summary_sources

__all__ = ["RecheckSpec", "RobustEvaluateSpec"]


class RecheckSpec(SpecModel):
    """The evaluation whose stored adversarial examples are checked again."""

    run: RunName = Field(description="finished run of robust.evaluate with keep_adversarial, in the same store")

    def inputs(self) -> Iterator[Input]:
        """The evaluation."""
        yield Input(("run",), "run", self.run, kinds=("robust.evaluate",))


class RobustEvaluateSpec(RunSpec):
    """Any classifier under a list of attacks, cheap to costly; or a recheck of its stored adversarial examples."""

    kind: Literal["robust.evaluate"]
    model: TargetModelSpec | None = Field(None, description="classifier under test")
    data: DataSpec | None = Field(
        None,
        description="data set; default, for a run, its own. Only its images are used: nothing is cropped or mirrored",
    )
    split: Literal["train", "validation", "test"] = Field("test", description="which images are attacked")
    num_examples: int | None = Field(
        None, ge=1, description="images of the split, the same share of each class whatever their order; default all"
    )
    batch_size: int = Field(
        256, ge=1, le=65_536, description="examples attacked and committed at once; does not affect the result"
    )
    attacks: list[Annotated[Stage, Field(discriminator="attack")]] = Field(
        [], max_length=100, description="the stages in order; each attacks the examples still correct under its threat"
    )
    keep_adversarial: bool = Field(
        False, description="store the adversarial examples that fooled the model, in float32"
    )
    recheck: RecheckSpec | None = Field(
        None, description="check the stored adversarial examples of another run instead"
    )

    @model_validator(mode="after")
    def _one_task(self) -> RobustEvaluateSpec:
        if self.recheck is not None:
            for key in ("model", "data", "split", "num_examples", "attacks", "keep_adversarial"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise field_error(key, f"{self.recheck.run} has chosen that: remove it")
            return self
        if self.model is None:
            raise field_error("model", "is required: run: RUN, file: FILE or function: MODULE:FUNCTION")
        if self.data is None and self.model.run is None:
            raise field_error("data", f"is required: a {self.model.source} does not say what it was trained on")
        if not self.attacks:
            raise field_error(
                "attacks", "at least one is needed, such as {attack: pgd, threat: {norm: linf, eps: 8/255}}"
            )
        self._check_radii()
        self._check_stage_names()
        return self

    def _check_radii(self) -> None:
        """Refuse balls that no image can leave."""
        sizes = None if self.data is None else known_sizes(self.data)
        pixels = sizes and math.prod(sizes.shape)
        for index, stage in enumerate(self.attacks):
            for ball in stage.balls:
                problem = oversized(ball.norm, float(ball.eps), pixels)
                if problem:
                    raise field_error(f"attacks.{index}", problem)

    def _check_stage_names(self) -> None:
        """Refuse two stages of one name."""
        names = {"clean"}
        for index, stage in enumerate(self.attacks):
            repeated = names.intersection(stage.keys)
            if repeated:
                message = f"the name {min(repeated)} is taken: give this stage another `name`"
                raise field_error(f"attacks.{index}", message)
            names.update(stage.keys)

    def metrics(self) -> dict[str, MetricSource]:
        """Accuracies on the attacked images; their rows have the split `test`, whatever the split of the images."""
        if self.recheck is not None:
            return {}
        source = MetricSource(self.split, "test", attacks="evaluation")
        names = ["clean", *(f"robust/{column}" for column in self._columns()), "robust/union"]
        return dict.fromkeys(names, source) | summary_sources(["accuracy.*"], names, self.split, "evaluation")

    def _columns(self) -> list[str]:
        """The columns that accuracies are reported for: each ball, and each union of balls that one attack searches."""
        names = threat_names(self.attacks)
        columns: list[str] = []
        for stage in self.attacks:
            ball_names = [names[ball] for ball in stage.balls]
            if isinstance(stage, MsdStage):
                columns.append("+".join(ball_names))
            else:
                columns += ball_names
        return list(dict.fromkeys(columns))

    def cost(self) -> list[str]:
        """The cost of each stage for an example that it does not fool."""
        if self.recheck is not None:
            return [f"one query for each adversarial example that {self.recheck.run} has kept"]
        lines = []
        for stage in self.attacks:
            gradients, queries = stage.spent()
            keys = ", ".join(stage.keys)
            lines.append(f"{keys}: at most {gradients:,} gradients and {queries:,} queries per example")
        return [*lines, f"{self.workers.count} workers of {self.workers.cpus} CPU and {self.workers.gpus} GPU"]
