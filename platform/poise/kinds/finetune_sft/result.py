"""The result of fine-tuning a language model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from poise.kinds.common.trained_result import TrainedResult
from poise.store.result import ResultModel, Score

__all__ = ["FinetuneSftResult", "TokenCounts"]


class TokenCounts(ResultModel):
    """Counts of the training set, and the supervised tokens of all batches of the run (`learned_from`)."""

    examples: int
    all: int
    supervised: int
    learned_from: int


class FinetuneSftResult(TrainedResult):
    """Held-out losses in nats per token; in a world, also in nats per answer against its true answers."""

    kind: Literal["finetune.sft"] = "finetune.sft"
    tuning: str = Field(description="which weights were trained, in words")
    trainable: int = Field(description="parameters that were trained")
    measured: dict[str, Score] = Field(description="by measure, such as ce, entropy, answer_ce")
    floor: float | None = Field(
        description="in a world: the entropy of its true answers, the lowest possible cross entropy"
    )
    tokens: TokenCounts
    supervised_share: float = Field(description="share of the training tokens that are supervised")
    tokens_per_answer: float
    preview: list[tuple[str | None, str | None]] = Field(
        description="the first training example: each token, with its label where it is supervised"
    )
