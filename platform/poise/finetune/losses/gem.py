"""GEM, which preserves diversity (Li et al., arXiv 2408.16673).

An opponent q = softmax(z / beta), held fixed, weighs the tokens that the model prefers to the label y:

    L = sum_k q_k w_k (z_k - z_y)        dL/dz_k = q_k w_k - 1[k = y] sum_j q_j w_j

with w = 1 (`linear`) or w_k = sigmoid(0.01 (z_k - z_y)), also fixed (`logsigmoid`). Linear GEM has the gradient of
beta * CE(z / beta): its optimum is p_data^beta, renormalised. The value is not a likelihood: log the cross entropy too.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from poise.finetune.losses.base import FinetuneLoss, num_tokens, supervised
from poise.spec import ExactNumber

__all__ = ["Gem", "Variant", "gem_loss"]

Variant = Literal["linear", "logsigmoid"]

SLOPE = 0.01
"""The factor of z_k - z_y in the sigmoid of the variant `logsigmoid`."""


class Gem(FinetuneLoss):
    """GEM: imitation that keeps the entropy of the answers (arXiv 2408.16673)."""

    per_token: ClassVar[bool] = True

    name: Literal["gem"] = Field("gem", description="game against softmax(logits / beta), held fixed")
    beta: Annotated[ExactNumber, Field(gt=0, le=10)] = Field(
        ExactNumber("0.7"), description="temperature of the opponent; 1 is cross entropy, less keeps more entropy"
    )
    variant: Variant = Field(
        "linear", description="weight of other preferred tokens; logsigmoid has half the gradient of linear"
    )

    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """See `gem_loss`."""
        return gem_loss(logits, labels, float(self.beta), self.variant, normalizer=normalizer)

    def describe(self) -> str:
        """The variant and beta, such as "gem (linear, beta 0.7)"."""
        return f"gem ({self.variant}, beta {self.beta})"


def gem_loss(
    logits: Tensor, labels: Tensor, beta: float = 0.7, variant: Variant = "linear", *, normalizer: float | None = None
) -> Tensor:
    """The GEM loss (see the module). ValueError for beta <= 0 or an unknown variant."""
    _check(beta, variant)
    z, y = supervised(logits, labels)
    margins = z - z.gather(1, y[:, None])  # (N, V), z_k - z_y
    weights = _weights(z.detach(), margins.detach(), beta, variant)  # constants for the gradient
    return (weights * margins).sum() / num_tokens(y, normalizer)


def _weights(z: Tensor, margins: Tensor, beta: float, variant: Variant) -> Tensor:
    """q_k w_k of each token (N, V)."""
    q = (z / beta).softmax(-1)
    if variant == "linear":
        return q
    return q * (SLOPE * margins).sigmoid()


def _check(beta: float, variant: str) -> None:
    if not beta > 0:
        raise ValueError(f"beta is a temperature above 0, not {beta}")
    if variant not in ("linear", "logsigmoid"):
        raise ValueError(f"a variant of GEM is linear or logsigmoid, not {variant!r}")
