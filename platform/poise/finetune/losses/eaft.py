"""EAFT, entropy-adaptive fine-tuning (arXiv 2601.02151): cross entropy, weighted by the entropy of the model.

    L = sg(w) (-log p_y),  w = (H_k / c)^alpha

H_k is the entropy of the k most probable tokens, renormalised; sg is a stop of the gradient. A token that the model is
sure of, rightly or wrongly, is learned little. The formula is that of public implementations, which differ in c:
LLaMA-Factory divides by 3.0, about the largest entropy of 20 tokens, axolotl by 1. A learning rate carries over from
one to the other after multiplication by 3^alpha only. The normaliser of the paper itself could not be read.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from poise.finetune.losses.base import FinetuneLoss, label_log_probs, num_tokens, supervised
from poise.spec import ExactNumber

__all__ = ["Eaft", "eaft_loss", "top_entropy"]


class Eaft(FinetuneLoss):
    """EAFT: cross entropy weighted by the entropy of the most probable tokens, held fixed."""

    per_token: ClassVar[bool] = True

    name: Literal["eaft"] = Field("eaft", description="cross entropy weighted by (H of the top tokens / scale)^alpha")
    top: int = Field(20, ge=2, le=100_000, description="number of most probable tokens whose entropy is the weight")
    alpha: Annotated[ExactNumber, Field(gt=0, le=10)] = Field(ExactNumber(1), description="power of the weight")
    scale: Annotated[ExactNumber, Field(gt=0, le=100)] = Field(
        ExactNumber(3), description="entropy, in nats, that has weight 1; LLaMA-Factory has 3, axolotl 1"
    )

    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """See `eaft_loss`."""
        return eaft_loss(logits, labels, self.top, float(self.alpha), float(self.scale), normalizer=normalizer)

    def describe(self) -> str:
        """The options, such as "eaft (top 20, alpha 1, scale 3)"."""
        return f"eaft (top {self.top}, alpha {self.alpha}, scale {self.scale})"


def eaft_loss(
    logits: Tensor,
    labels: Tensor,
    top: int = 20,
    alpha: float = 1.0,
    scale: float = 3.0,
    *,
    normalizer: float | None = None,
) -> Tensor:
    """The mean of -sg((H_top / scale)^alpha) log p(label) over supervised tokens."""
    z, y = supervised(logits, labels)
    weights = (top_entropy(z, top) / scale) ** alpha  # (N,)
    return -(weights * label_log_probs(z, y)).sum() / num_tokens(y, normalizer)


@torch.no_grad()
def top_entropy(z: Tensor, top: int) -> Tensor:
    """The entropy (N,), in nats, of the `top` most probable tokens of logits (N, V), renormalised; all V if fewer."""
    highest = z.topk(min(top, z.shape[-1]), dim=-1).values  # (N, top)
    log_p = highest.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
