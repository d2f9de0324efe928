"""`kind: bounds.report`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.data.images.spec import DataSpec
from poise.kinds.common.target_model_spec import TargetModelSpec, classifier_inputs
from poise.robust.spec import Threats
from poise.spec import ExactNumber, Input, RunName, RunSpec, field_error

__all__ = ["BoundsReportSpec"]


class BoundsReportSpec(RunSpec):
    """Operator norms of trained classifiers, generalisation bounds from them, and measured generalisation gaps."""

    kind: Literal["bounds.report"]
    runs: list[RunName] = Field(
        [], max_length=1000, description="finished runs of robust.train; a sweep stands for all its trials"
    )
    models: list[TargetModelSpec] = Field(
        [],
        max_length=1000,
        description="classifiers from elsewhere, each a file or a function; they need data and threats",
    )
    data: DataSpec | None = Field(None, description="data set of the models; a run has its own")
    threats: Threats | None = Field(
        None, description="balls of the adversary and the attacks in them; default, for each run, those of its test"
    )
    batch_size: int = Field(256, ge=1, le=65_536, description="images attacked at once, for models")
    num_examples: int = Field(
        1000,
        ge=2,
        description="examples of the training and of the test split for margins and gaps, the same share of each class",
    )
    percentile: Annotated[ExactNumber, Field(gt=0, lt=100)] = Field(
        ExactNumber("5"), description="which percentile of the clean training margins is the margin of the bounds"
    )
    margins: Literal["correct", "all"] = Field(
        "correct",
        description="margins that the percentile is of: those of correctly classified training images, or, as in the "
        "papers, of all; then networks with more training errors than the percentile have no bound",
    )
    radius: Literal["paper", "l2", "box"] = Field(
        "box", description="bound of the norm of an input: as printed in the papers, tighter (l2), tightest (box)"
    )
    delta: Annotated[ExactNumber, Field(gt=0, lt=1)] = Field(
        ExactNumber("1/20"), description="probability that a bound may fail"
    )

    @model_validator(mode="after")
    def _complete(self) -> BoundsReportSpec:
        if not self.runs and not self.models:
            raise field_error("runs", "is required: finished runs of robust.train, or models: [{file: FILE}, ...]")
        for index, model in enumerate(self.models):
            if model.run is not None:
                raise field_error(f"models.{index}.run", f"name it under runs instead: runs: [{model.run}]")
        if self.models and self.data is None:
            raise field_error("data", "is required: a file or a function does not say what it was trained on")
        if self.models and self.threats is None:
            raise field_error("threats", "is required, such as {linf: {eps: 8/255}}: a file or a function has no test")
        if self.data is not None and not self.models:
            raise field_error("data", "belongs to models: a run has its own data, remove it")
        return self

    def inputs(self) -> Iterator[Input]:
        """The runs of the classifiers, and the inputs of the sections."""
        yield from classifier_inputs(self.runs)
        yield from super().inputs()

    def cost(self) -> list[str]:
        """What is measured. The sizes of the networks are known from their runs."""
        count = len(self.runs) + len(self.models)
        lines = [
            f"{count} classifiers: norms of each affine layer in float64, attacks on 2 x {self.num_examples:,} images"
        ]
        if self.threats:
            gradients = sum(threat.steps * threat.restarts for _, threat in self.threats.items())
            lines.append(f"at most {2 * self.num_examples * gradients:,} image gradients for each of them")
        return lines
