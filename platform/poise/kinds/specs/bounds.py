"""`kind: bounds.report`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.data.spec import DataSpec
from poise.kinds.specs.evaluation import SubjectSpec
from poise.robust.spec import Threats
from poise.spec import Input, Real, RunName, RunSpec, mistake

__all__ = ["BoundsReportSpec"]


class BoundsReportSpec(RunSpec):
    """Operator norms of trained classifiers, the bounds made of them, and the gaps that were measured."""

    kind: Literal["bounds.report"]
    runs: list[RunName] = Field(
        [], max_length=1000, description="finished runs of robust.train; a sweep stands for all its trials"
    )
    models: list[SubjectSpec] = Field(
        [],
        max_length=1000,
        description="classifiers from elsewhere, each a file or a function; they need data and threats",
    )
    data: DataSpec | None = Field(None, description="data set of the models; a run has its own")
    threats: Threats | None = Field(
        None, description="what the adversary may do and how it searches; default, of each run, that of its test"
    )
    batch_size: int = Field(256, ge=1, le=65_536, description="images of a model that are attacked at once")
    examples: int = Field(
        1000,
        ge=2,
        description="examples of the training and of the test split that margins and gaps are of, in equal shares",
    )
    percentile: Annotated[Real, Field(gt=0, lt=100)] = Field(
        Real("5"), description="which percentile of the clean training margins is the margin of the bounds"
    )
    margins: Literal["correct", "all"] = Field(
        "correct",
        description="margins that the percentile is of: those of correctly classified training images, or, as in the "
        "papers, of all; then networks with more training errors than the percentile have no bound",
    )
    radius: Literal["paper", "l2", "box"] = Field(
        "box", description="how far data can lie from the origin: as printed in the papers, tighter, tightest"
    )
    delta: Annotated[Real, Field(gt=0, lt=1)] = Field(Real("1/20"), description="probability that a bound may fail")

    @model_validator(mode="after")
    def _complete(self) -> BoundsReportSpec:
        if not self.runs and not self.models:
            raise mistake("runs", "is required: finished runs of robust.train, or models: [{file: FILE}, ...]")
        for index, model in enumerate(self.models):
            if model.run is not None:
                raise mistake(f"models.{index}.run", f"name it under runs instead: runs: [{model.run}]")
        if self.models and self.data is None:
            raise mistake("data", "is required: a file or a function does not say what it was trained on")
        if self.models and self.threats is None:
            raise mistake("threats", "is required, such as {linf: {eps: 8/255}}: a file or a function has no test")
        if self.data is not None and not self.models:
            raise mistake("data", "belongs to models: a run has its own data, remove it")
        return self

    def inputs(self) -> Iterator[Input]:
        """The classifiers, and what the sections read."""
        for index, name in enumerate(self.runs):
            yield Input(("runs", index), "run", name, kinds=("robust.train", "sweep"))
        yield from super().inputs()

    def cost(self) -> list[str]:
        """What is measured; how large the networks are stands in their runs."""
        count = len(self.runs) + len(self.models)
        lines = [f"{count} classifiers: norms of each affine layer in float64, attacks on 2 x {self.examples:,} images"]
        if self.threats:
            gradients = sum(threat.steps * threat.restarts for _, threat in self.threats.items())
            lines.append(f"at most {2 * self.examples * gradients:,} image gradients for each of them")
        return lines
