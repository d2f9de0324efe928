"""Label smoothing: cross entropy against a mixture of the label and the uniform distribution.

L = (1 - s) (-log p_y) + s mean_k (-log p_k)        dL/dz_k = p_k - (1 - s) 1[k = y] - s / V
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from poise.finetune.losses.base import FinetuneLoss, num_tokens, supervised
from poise.spec import ExactNumber

__all__ = ["LabelSmoothing", "label_smoothing_loss"]


class LabelSmoothing(FinetuneLoss):
    """Cross entropy against labels that are smoothed over the whole vocabulary."""

    per_token: ClassVar[bool] = True

    name: Literal["label_smoothing"] = Field(
        "label_smoothing", description="cross entropy against a mixture of the label and all tokens"
    )
    smoothing: Annotated[ExactNumber, Field(ge=0, lt=1)] = Field(
        ExactNumber("0.1"), description="share of the uniform distribution; 0 is cross entropy"
    )

    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """See `label_smoothing_loss`."""
        return label_smoothing_loss(logits, labels, float(self.smoothing), normalizer=normalizer)

    def describe(self) -> str:
        """The share, such as "label_smoothing (0.1)"."""
        return f"label_smoothing ({self.smoothing})"


def label_smoothing_loss(
    logits: Tensor, labels: Tensor, smoothing: float = 0.1, *, normalizer: float | None = None
) -> Tensor:
    """The mean over supervised tokens (nats)."""
    z, y = supervised(logits, labels)
    return nn.functional.cross_entropy(z, y, reduction="sum", label_smoothing=smoothing) / num_tokens(y, normalizer)
