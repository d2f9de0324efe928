"""Cross entropy with a bonus for the entropy of the model.

    L = -log p_y - gamma H(p)        dL/dz_k = p_k - 1[k = y] + gamma p_k (log p_k + H)

The entropy has a gradient; it is the baseline "CE + entropy" of the paper of GEM (arXiv 2408.16673), gamma 0.1.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from poise.finetune.losses.base import FinetuneLoss, num_tokens, supervised
from poise.spec import ExactNumber

__all__ = ["EntropyRegularized", "entropy_regularized_loss"]


class EntropyRegularized(FinetuneLoss):
    """Cross entropy minus gamma times the entropy of the model at each supervised token."""

    per_token: ClassVar[bool] = True

    name: Literal["entropy_regularized"] = Field(
        "entropy_regularized", description="cross entropy minus gamma times the entropy of the model"
    )
    gamma: Annotated[ExactNumber, Field(ge=0, le=10)] = Field(
        ExactNumber("0.1"), description="weight of the entropy; 0 is cross entropy"
    )

    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """See `entropy_regularized_loss`."""
        return entropy_regularized_loss(logits, labels, float(self.gamma), normalizer=normalizer)

    def describe(self) -> str:
        """The weight, such as "entropy_regularized (gamma 0.1)"."""
        return f"entropy_regularized (gamma {self.gamma})"


def entropy_regularized_loss(
    logits: Tensor, labels: Tensor, gamma: float = 0.1, *, normalizer: float | None = None
) -> Tensor:
    """The mean of -log p(label) - gamma H(p) over supervised tokens (nats)."""
    z, y = supervised(logits, labels)
    log_p = z.log_softmax(-1)  # (N, V)
    negative_entropy = (log_p.exp() * log_p).sum()
    of_labels = log_p.gather(1, y[:, None]).sum()
    return (gamma * negative_entropy - of_labels) / num_tokens(y, normalizer)
