"""SED-SFT (arXiv 2602.07464): cross entropy, and where the model spreads its mass, a pull of the label to one half.

    L = -log p_y + lambda 1[S_k < tau] (p_y - 1/2)^2        S_k: mass of the k most probable tokens, without a gradient

The second term, p_y (p_y - 1) + 1/4, is called an entropy in the authors' code; it is not H(p). tau is fixed before the
first step, so that `share` of all tokens of 100 examples, prompts included, have an S_k of at least tau. The rule is
that of the authors' code, except that there an unset k is 10 for tau and 2 for the mask, and here it is the same. The
paper's text could not be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from poise.finetune.losses.base import FinetuneLoss, label_log_probs, num_tokens, supervised
from poise.spec import ExactNumber

__all__ = ["Sed", "sed_loss", "top_mass"]


class Sed(FinetuneLoss):
    """SED: cross entropy with a pull of the label's probability to one half, where the model is not sure."""

    per_token: ClassVar[bool] = True

    name: Literal["sed"] = Field("sed", description="cross entropy, and weight (p - 1/2)^2 at labels of unsure tokens")
    weight: Annotated[ExactNumber, Field(ge=0, le=100)] = Field(
        ExactNumber(1), description="weight of the second term; 0 is cross entropy"
    )
    top: int = Field(2, ge=1, le=100_000, description="number of most probable tokens whose mass tells how sure it is")
    share: Annotated[ExactNumber, Field(ge=0, le=1)] = Field(
        ExactNumber("0.3"), description="share of tokens that the model counts as sure of, before the first step"
    )
    threshold: Annotated[ExactNumber, Field(gt=0, le=2)] | None = Field(
        None, description="mass below which a token is unsure (default: measured by `share` before the first step)"
    )

    def prepare(self, logits: Iterable[Tensor]) -> Sed:
        """Measure `threshold`, unless it is given."""
        if self.threshold is not None:
            return self
        masses = torch.cat([top_mass(part, self.top) for part in logits]).sort(descending=True).values
        num_sure = int(float(self.share) * len(masses))
        # The num_sure-th largest; above every mass where no token is to count as sure.
        threshold = masses[num_sure - 1].item() if num_sure else 2.0
        return self.model_copy(update={"threshold": ExactNumber(repr(threshold))})

    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """See `sed_loss`. ValueError before `prepare`, where no `threshold` is given."""
        if self.threshold is None:
            raise ValueError("sed has no threshold: give one, or call `prepare`")
        weight = float(self.weight)
        return sed_loss(logits, labels, float(self.threshold), weight, self.top, normalizer=normalizer)

    def describe(self) -> str:
        """The options, such as "sed (weight 1, top 2, threshold 0.83)"."""
        threshold = "" if self.threshold is None else f", threshold {float(self.threshold):.4g}"
        return f"sed (weight {self.weight}, top {self.top}{threshold})"


def sed_loss(
    logits: Tensor,
    labels: Tensor,
    threshold: float,
    weight: float = 1.0,
    top: int = 2,
    *,
    normalizer: float | None = None,
) -> Tensor:
    """The mean of -log p + weight 1[S_top < threshold] (p - 1/2)^2 at the labels of supervised tokens."""
    z, y = supervised(logits, labels)
    log_p = label_log_probs(z, y)  # (N,)
    is_unsure = top_mass(z, top) < threshold  # (N,)
    pull = (log_p.exp() - 0.5).square() * is_unsure
    return (weight * pull - log_p).sum() / num_tokens(y, normalizer)


@torch.no_grad()
def top_mass(z: Tensor, top: int) -> Tensor:
    """The probability (N,) of the `top` most probable tokens together, under logits (N, V)."""
    highest = z.topk(min(top, z.shape[-1]), dim=-1).values  # (N, top)
    return (highest - z.logsumexp(-1, keepdim=True)).exp().sum(-1)
