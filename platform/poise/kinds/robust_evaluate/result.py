"""The result of an evaluation under attack, or of a recheck of adversarial examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from poise.store.result import ResultModel, RunResult

__all__ = ["BallResult", "RecheckCounts", "RecheckResult", "RobustEvaluateResult", "StageSummary"]


class BallResult(ResultModel):
    """The ball of a threat: radius in its norm, pixels in [0, 1]."""

    norm: str
    eps: float
    words: str


class StageSummary(ResultModel):
    """The result of one stage on all examples that withstood the stages before it."""

    name: str
    threat: str = Field(description="column that it counts for: a ball or a union; empty for the clean stage")
    attack: str = Field(description="the attack and its options in words")
    attacked: int
    fooled: int
    still_correct: float = Field(description="share of all examples that withstand its threat so far")
    union: float = Field(description="share of all examples that withstand everything so far")
    gradients: int = Field(description="images of which a gradient was taken")
    queries: int = Field(description="images that went through the model")


class RecheckCounts(ResultModel):
    """Stored adversarial examples of one stage; how many of them fool the model, and how many lie in their ball."""

    stored: int
    fools: int
    feasible: int


class RecheckResult(ResultModel):
    """The recheck of the stored adversarial examples of run `run`."""

    run: str
    stages: dict[str, RecheckCounts]


class RobustEvaluateResult(RunResult):
    """Accuracies of the attacked weights by measure: "clean", "robust/<threat>" and "robust/union"."""

    kind: Literal["robust.evaluate"] = "robust.evaluate"
    num_examples: int = Field(description="images that were attacked, or stored examples that were checked")
    model: str | None = Field(None, description="where the weights come from")
    selected: str | None = Field(None, description="which weights: best, final, averaged, file or function")
    split: str | None = None
    accuracy: dict[str, dict[str, float]] = Field({}, description="by weights and measure")
    intervals: dict[str, tuple[float, float]] = Field({}, description="95% Wilson interval of each accuracy")
    threats: dict[str, BallResult] = Field({}, description="by column")
    stages: list[StageSummary] = Field([], description="the result of each stage, in order")
    weights_sha256: str | None = None
    rechecked: RecheckResult | None = None

    @property
    def accuracies(self) -> dict[str, float]:
        """By measure; empty for a recheck."""
        return self.accuracy.get(self.selected or "", {})

    def num_examples_of(self, split: str) -> int | None:
        """The number of attacked images, whatever their split: their rows have the split `test`."""
        return None if split == "train" else self.num_examples

    def facts(self) -> Iterator[tuple[str, str]]:
        """How many images there were."""
        yield "examples", f"{self.num_examples:,}"
