"""The result of a robust training: accuracies of its checkpoints, clean and under attack."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from poise.kinds.common.attack_description import AttackDescription
from poise.kinds.common.trained_result import TrainedResult
from poise.store.result import ResultModel, Score

__all__ = ["EarlyStopResult", "RobustTrainResult"]

Accuracies = dict[str, Score]
"""By measure: "clean", "robust/<norm>", "robust/average" and "robust/union", in [0, 1]."""


class EarlyStopResult(ResultModel):
    """An alarm that ended the training before its last step."""

    step: int
    why: str


class RobustTrainResult(TrainedResult):
    """Accuracies by checkpoint ("best", "final", "averaged") and measure, on the test split."""

    kind: Literal["robust.train"] = "robust.train"
    split: Literal["test"] = "test"
    num_examples: int = Field(description="test images that were attacked")
    attacks: dict[str, AttackDescription] = Field(description="by norm")
    accuracy: dict[str, Accuracies] = Field(description="by checkpoint")
    validation: dict[str, Accuracies] = Field(
        {}, description="the same on the validation split, with evaluate.validation"
    )
    num_validation_examples: int = Field(0, description="validation images that were attacked")
    extra_metrics: dict[str, dict[str, float]] = Field(
        {}, description="by checkpoint, the metrics of the user's code on the test images, as metric/NAME"
    )
    best_minus_final: Accuracies = Field({}, description="accuracy of the best checkpoint minus that of the final one")
    stopped: EarlyStopResult | None = None

    @property
    def checkpoints(self) -> list[str]:
        """The evaluated checkpoints, the selected one first."""
        return sorted(self.accuracy, key=lambda name: name != self.selected)

    def num_examples_of(self, split: str) -> int | None:
        """The number of attacked images of the test or of the validation split."""
        return {"test": self.num_examples, "validation": self.num_validation_examples}.get(split)
