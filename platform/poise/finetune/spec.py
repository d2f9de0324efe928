"""The fine-tuning sections of a spec: the loss, and the weights that are tuned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from poise.spec import ExactNumber, SpecModel

__all__ = ["Ce", "Full", "Gem", "Lora", "LossSpec", "TuningSpec"]


class Ce(SpecModel):
    """Cross entropy: the negative log-likelihood of the completions."""

    name: Literal["ce"] = Field("ce", description="mean of -log p over the tokens of the completions")


class Gem(SpecModel):
    """GEM: imitation that keeps the entropy of the answers (arXiv 2408.16673)."""

    name: Literal["gem"] = Field("gem", description="game against softmax(logits / beta), held fixed")
    beta: Annotated[ExactNumber, Field(gt=0, le=10)] = Field(
        ExactNumber("0.7"), description="temperature of the opponent; 1 is cross entropy, less keeps more entropy"
    )
    variant: Literal["linear", "logsigmoid"] = Field(
        "linear", description="weight of other preferred tokens; logsigmoid has half the gradient of linear"
    )


LossSpec = Annotated[Ce | Gem, Field(discriminator="name")]


class Full(SpecModel):
    """All weights are tuned."""

    name: Literal["full"] = Field("full", description="tune all weights")


class Lora(SpecModel):
    """Low-rank updates of linear layers, with all other weights frozen; the export merges them into the weights."""

    name: Literal["lora"] = Field("lora", description="tune W + alpha / rank * B A, with B = 0 at the start")
    rank: int = Field(16, ge=1, le=4096, description="rank of the update of each layer")
    alpha: Annotated[ExactNumber, Field(gt=0, le=100_000)] = Field(
        ExactNumber(32), description="scale of the update, over rank"
    )
    dropout: Annotated[ExactNumber, Field(ge=0, lt=1)] = Field(
        ExactNumber(0), description="share of the inputs of an update that is dropped in training"
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="last parts of the names of layers that get an update, such as q_proj; default all but the head",
    )


TuningSpec = Annotated[Full | Lora, Field(discriminator="name")]
