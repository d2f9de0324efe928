"""FGSM-RS: fast adversarial training, one step from a random start (Wong et al., 2020)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from poise.robust.objectives.base import (
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    craft_one,
    require_one_threat,
)
from poise.robust.objectives.forward import output_at_one_threat
from poise.robust.objectives.one_step import check_one_step
from poise.robust.spec import Threats
from poise.spec import ExactNumber

__all__ = ["FgsmRs"]


class FgsmRs(Objective):
    """Fast adversarial training: one step from a random start (Wong et al., 2020).

    CE at the projection of delta + a steepest(grad at x + delta), where delta is uniform in the ball and a = 1.25 eps.
    With a linear model and linf, E|delta_i| is 55/64 eps, and 3/4 eps for a = eps.
    """

    name: Literal["fgsm_rs"] = Field(default="fgsm_rs", description="loss after one step from a random start")
    step: Annotated[ExactNumber, Field(gt=0, le=10)] = Field(
        default=ExactNumber("1.25"),
        description="length of the step in units of eps; the `steps` of the threat are for tests",
    )

    def check(self, threats: Threats) -> None:
        """Exactly one threat, without an attack of its own."""
        require_one_threat(self.name, threats)
        check_one_step(self.name, threats)

    def gradients_per_batch(self, threats: Threats) -> int:
        """That of the one step."""
        return 1

    def craft(self, context: ObjectiveContext) -> Points:
        """The points after one step of the only threat."""
        ((norm, attack),) = context.attacks.items()
        length = float(self.step) * attack.threat.eps
        return craft_one(context, norm, steps=1, step_size=length, restarts=1, random_start=True)

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean cross entropy after the step."""
        return output_at_one_threat(points, context)
