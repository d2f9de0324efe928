"""MART: adversarial training that weighs misclassified examples more (Wang et al., 2020)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from poise.robust.attacks import cross_entropy
from poise.robust.attacks.losses import divergence, wide
from poise.robust.objectives.base import (
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    craft_one,
    require_one_threat,
)
from poise.robust.objectives.clean import Spread, check_spread, output_at_clean_and_attacked, start_options
from poise.robust.spec import Threats
from poise.spec import ExactNumber

__all__ = ["Mart", "mart_losses"]


class Mart(Objective):
    """Adversarial training that weighs misclassified examples more (MART, Wang et al., 2020).

    (1/N) sum_i BCE(p_i(x')) + beta KL(p_i(x) || p_i(x')) (1 - p_{i,y}(x)), where p(x) is the softmax of the model at x,
    x' maximises the cross entropy, and BCE(p) = -log p_y - log(1.0001 - max_{k != y} p_k).
    """

    name: Literal["mart"] = Field(
        default="mart",
        description="boosted loss under attack plus beta times the divergence, weighed by the error on clean images",
    )
    beta: Annotated[ExactNumber, Field(ge=0, le=1_000)] = Field(
        default=ExactNumber("5"), description="weight of the divergence"
    )
    spread: Spread = ExactNumber("0.001")

    def check(self, threats: Threats) -> None:
        """Exactly one threat, whose attack can start with the spread."""
        require_one_threat(self.name, threats)
        check_spread(self.spread, threats)

    def losses_per_batch(self, threats: Threats) -> int:
        """One at the images and one at the adversarial examples."""
        return 2

    def craft(self, context: ObjectiveContext) -> Points:
        """Points of the only threat that maximise the cross entropy."""
        (norm,) = context.attacks
        return craft_one(context, norm, **start_options(self.spread))

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean of `mart_losses`."""
        return output_at_clean_and_attacked(points, context, mart_losses, float(self.beta))


def mart_losses(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """The loss of each example (N,) from logits (N, K) at x and x'."""
    probabilities = functional.softmax(wide(attacked), dim=1)  # (N, K)
    largest_other = probabilities.scatter(1, y.unsqueeze(1), 0).amax(1)  # (N,), max_{k != y} p_k(x')
    boosted = cross_entropy(attacked, y) - torch.log(1.0001 - largest_other)
    # expm1(-CE) = p_y - 1, so that 1 - p_y keeps its digits where p_y is close to 1
    return boosted - beta * divergence(clean, attacked) * torch.expm1(-cross_entropy(clean, y))
