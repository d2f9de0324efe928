"""DFT, dynamic fine-tuning (arXiv 2508.05629): cross entropy, weighted by the probability of the label.

    L = sg(p_y) (-log p_y)        dL/dz_k = p_y (p_k - 1[k = y])

sg is a stop of the gradient. With a gradient through the weight, a label of probability below 1/e would be unlearned.
The rule is that of public implementations in TRL and LLaMA-Factory.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from poise.finetune.losses.base import FinetuneLoss, label_log_probs, num_tokens, supervised

__all__ = ["Dft", "dft_loss"]


class Dft(FinetuneLoss):
    """DFT: cross entropy weighted by the probability of each label, held fixed."""

    per_token: ClassVar[bool] = True

    name: Literal["dft"] = Field("dft", description="-p log p at the labels, without a gradient through the weight p")

    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """See `dft_loss`."""
        return dft_loss(logits, labels, normalizer=normalizer)


def dft_loss(logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
    """The mean of -sg(p(label)) log p(label) over supervised tokens."""
    z, y = supervised(logits, labels)
    log_p = label_log_probs(z, y)  # (N,)
    return -(log_p.detach().exp() * log_p).sum() / num_tokens(y, normalizer)
