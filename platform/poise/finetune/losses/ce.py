"""Cross entropy, and the entropy of the model, which is reported beside every loss."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from poise.finetune.losses.base import FinetuneLoss, num_tokens, supervised

__all__ = ["Ce", "cross_entropy", "entropy"]


class Ce(FinetuneLoss):
    """Cross entropy: the negative log-likelihood of the completions."""

    per_token: ClassVar[bool] = True

    name: Literal["ce"] = Field("ce", description="mean of -log p over the tokens of the completions")

    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """See `cross_entropy`."""
        return cross_entropy(logits, labels, normalizer=normalizer)


def cross_entropy(logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
    """The mean of -log p(label) over supervised tokens (nats)."""
    z, y = supervised(logits, labels)
    return nn.functional.cross_entropy(z, y, reduction="sum") / num_tokens(y, normalizer)


@torch.no_grad()
def entropy(logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
    """The mean entropy of the model's next token over supervised positions (nats); a measure, not a loss."""
    z, y = supervised(logits, labels)
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum() / num_tokens(y, normalizer)
