"""The fine-tuning sections of a spec: what is minimised, and which weights move."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from poise.spec import Real, Section

__all__ = ["Ce", "Full", "Gem", "Lora", "LossSpec", "TuningSpec"]


class Ce(Section):
    """Cross entropy: the likelihood of what was written."""

    name: Literal["ce"] = Field("ce", description="mean of -log p over the tokens of the completions")


class Gem(Section):
    """GEM: imitation that keeps the entropy of the answers (arXiv 2408.16673)."""

    name: Literal["gem"] = Field("gem", description="game against softmax(logits / beta), held fixed")
    beta: Annotated[Real, Field(gt=0, le=10)] = Field(
        Real("0.7"), description="temperature of the opponent; 1 is cross entropy, less keeps more entropy"
    )
    variant: Literal["linear", "logsigmoid"] = Field(
        "linear", description="how a preference for other tokens counts; logsigmoid has half the gradient"
    )


LossSpec = Annotated[Ce | Gem, Field(discriminator="name")]


class Full(Section):
    """Every weight moves."""

    name: Literal["full"] = Field("full", description="tune all weights")


class Lora(Section):
    """Low-rank updates of linear layers, the rest frozen; the export has them merged into the weights."""

    name: Literal["lora"] = Field("lora", description="tune W + alpha / rank * B A, with B = 0 at the start")
    rank: int = Field(16, ge=1, le=4096, description="rank of the update of each layer")
    alpha: Annotated[Real, Field(gt=0, le=100_000)] = Field(Real(32), description="scale of the update, over rank")
    dropout: Annotated[Real, Field(ge=0, lt=1)] = Field(
        Real(0), description="share of the inputs of an update that is dropped in training"
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="last parts of the names of layers that get an update, such as q_proj; default all but the head",
    )


TuningSpec = Annotated[Full | Lora, Field(discriminator="name")]
