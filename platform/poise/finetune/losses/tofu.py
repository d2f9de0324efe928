"""TOFU (arXiv 2605.00195): cross entropy at a temperature, weighted by the factor of the focal loss.

    L = -sg(g) beta log p^beta_y,   p^beta = softmax(z / beta)        dL/dz_k = g (p^beta_k - 1[k = y])
    g = (1 - p_y)^gamma - gamma p_y (1 - p_y)^(gamma - 1) log p_y

sg is a stop of the gradient. At beta = 1 the gradient is that of the focal loss -(1 - p_y)^gamma log p_y. A factor
beta below 1 sharpens the model that is compared with the label. The rule is that of the authors' code; the paper's
text could not be read.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from poise.finetune.losses.base import FinetuneLoss, label_log_probs, num_tokens, supervised
from poise.spec import ExactNumber

__all__ = ["Tofu", "tofu_loss"]


class Tofu(FinetuneLoss):
    """TOFU: cross entropy at a temperature, weighted by the gradient of the focal loss, held fixed."""

    per_token: ClassVar[bool] = True

    name: Literal["tofu"] = Field("tofu", description="cross entropy at temperature beta with focal weights")
    gamma: Annotated[ExactNumber, Field(ge=1, le=20)] = Field(
        ExactNumber(3), description="power of the focal loss: more leaves tokens alone that are known"
    )
    beta: Annotated[ExactNumber, Field(gt=0, le=10)] = Field(
        ExactNumber("0.8"), description="temperature of the model that is compared with the label"
    )

    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """See `tofu_loss`."""
        return tofu_loss(logits, labels, float(self.gamma), float(self.beta), normalizer=normalizer)

    def describe(self) -> str:
        """The options, such as "tofu (gamma 3, beta 0.8)"."""
        return f"tofu (gamma {self.gamma}, beta {self.beta})"


def tofu_loss(
    logits: Tensor, labels: Tensor, gamma: float = 3.0, beta: float = 0.8, *, normalizer: float | None = None
) -> Tensor:
    """The mean of -sg(g) beta log p^beta(label) over supervised tokens (see the module)."""
    z, y = supervised(logits, labels)
    weights = _focal_weights(label_log_probs(z.detach(), y), gamma)
    return -beta * (weights * label_log_probs(z / beta, y)).sum() / num_tokens(y, normalizer)


def _focal_weights(log_p: Tensor, gamma: float) -> Tensor:
    """g (N,) for the log-probabilities of the labels (N,).

    p log p tends to 0 as p does, although log p has no limit: exp underflows to 0 before log p is infinite.
    """
    p = log_p.exp()
    rest = -torch.expm1(log_p)  # 1 - p, exact where p is near 1
    return rest**gamma - gamma * p * rest ** (gamma - 1) * log_p
