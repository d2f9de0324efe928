"""SAT: adversarial training on one threat per batch, drawn evenly."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from poise.robust.objectives.base import (
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    craft_one,
    gradients_of_one_draw,
)
from poise.robust.objectives.forward import output_at_one_threat
from poise.robust.spec import Threats

__all__ = ["Sat"]


class Sat(Objective):
    """Adversarial training on one threat per batch: l_p, each of the P threats with probability 1/P.

    Source: Madaan et al., 2021.
    """

    name: Literal["sat"] = Field(default="sat", description="loss under one threat, drawn evenly for each batch")

    def gradients_per_batch(self, threats: Threats) -> int:
        """The mean over threats of steps times restarts."""
        return gradients_of_one_draw(threats)

    def losses_per_batch(self, threats: Threats) -> int:
        """One, under the drawn threat."""
        return 1

    def craft(self, context: ObjectiveContext) -> Points:
        """The adversarial examples of the drawn threat."""
        norms = tuple(context.attacks)
        return craft_one(context, norms[int(context.draw * len(norms))])

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean cross entropy under the drawn threat."""
        return output_at_one_threat(points, context)
