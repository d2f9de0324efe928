"""GradAlign: fast adversarial training with aligned input gradients (Andriushchenko and Flammarion, 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from poise.robust.noise import as_noise
from poise.robust.objectives.base import (
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    craft_one,
    require_one_threat,
)
from poise.robust.objectives.forward import output_at_one_threat
from poise.robust.objectives.one_step import check_one_step, gradient_cosines
from poise.robust.spec import Threats
from poise.spec import ExactNumber

__all__ = ["GradAlign"]


class GradAlign(Objective):
    """Fast adversarial training that keeps the input gradient aligned over the ball.

    CE at FGSM's point (or the threat's own) + lambda (1 - cos(grad_x CE(x), grad_x CE(x + u))), where u is uniform in
    the ball (Andriushchenko and Flammarion, 2020). The parameter gradient goes through both input gradients. An example
    whose input gradient is zero at one of the two points has no angle, and is left out of the mean.
    """

    name: Literal["gradalign"] = Field(
        default="gradalign", description="adversarial loss plus 1 - cosine between input gradients within the ball"
    )
    attack: Literal["fgsm", "threat"] = Field(
        default="fgsm", description="fgsm: one step of length eps from the image; threat: the attack of the threat"
    )
    alignment: Annotated[ExactNumber, Field(ge=0, le=1_000)] = Field(
        default=ExactNumber("0.2"), description="weight of 1 - cosine"
    )

    def check(self, threats: Threats) -> None:
        """Exactly one threat; for FGSM without an attack of its own."""
        require_one_threat(self.name, threats)
        if self.attack == "fgsm":
            check_one_step(self.name, threats)

    def gradients_per_batch(self, threats: Threats) -> int:
        """Those of the attack, and two for the angle."""
        return 2 + (1 if self.attack == "fgsm" else super().gradients_per_batch(threats))

    def losses_per_batch(self, threats: Threats) -> int:
        """One at the adversarial examples and two for the angle."""
        return 3

    @property
    def training_metrics(self) -> Sequence[str]:
        """The mean cosine between the input gradients at the image and at the random point."""
        return ("gradient_cosine",)

    def craft(self, context: ObjectiveContext) -> Points:
        """FGSM's points for the only threat, or those of its attack."""
        ((norm, attack),) = context.attacks.items()
        if self.attack == "threat":
            return craft_one(context, norm)
        return craft_one(context, norm, steps=1, step_size=attack.threat.eps, restarts=1, random_start=False)

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean cross entropy plus the weighted misalignment; every call draws u from `context.noise` anew."""
        (attack,) = context.attacks.values()
        x = context.x
        output = output_at_one_threat(points, context)
        uniform = as_noise(context.noise, x).uniform(x[0].numel() + 1, x.dtype)  # (N, d + 1)
        random_point = x + attack.threat.random_start_from(x, uniform)
        cosines, has_angle = gradient_cosines(context.model, x, random_point, context.y)  # (N,) each
        count = has_angle.sum()
        misalignment = ((1 - cosines) * has_angle).sum() / count.clamp(min=1)
        loss = output.loss + float(self.alignment) * misalignment
        metrics = output.metrics | {"gradient_cosine": 1 - misalignment.detach()}
        return ObjectiveOutput(loss, metrics, output.state)
