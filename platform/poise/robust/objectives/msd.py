"""MSD: adversarial training on one attack each of whose steps is that of the worst threat."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from poise.robust.attacks import msd_perturb
from poise.robust.objectives.base import (
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    check_same_norms,
    unwrap,
)
from poise.robust.objectives.forward import output_at_shared_points
from poise.robust.spec import Norm, StepSize, Threats
from poise.robust.step_sizes import TRAINING_STEP

__all__ = ["Msd"]


class Msd(Objective):
    """Adversarial training on one attack each of whose steps is that of the worst threat (Maini et al., 2020).

    There is one perturbation. Each of its steps is the projected steepest step of that norm which leaves the example
    the highest loss. So the perturbation lies in the union of the balls; it starts at the image. See
    `attacks.msd_perturb`.
    """

    name: Literal["msd"] = Field(default="msd", description="loss under one attack that chooses a norm at every step")
    steps: int = Field(
        default=50, ge=1, le=1000, description="steps of the attack; the `steps` of a threat are for tests"
    )
    step_sizes: dict[Norm, StepSize] | None = Field(
        default=None, description=f"length of a step in each threat's own norm; default {TRAINING_STEP}"
    )

    def check(self, threats: Threats) -> None:
        """The step sizes, if there are any, are those of the threats."""
        if self.step_sizes:
            check_same_norms("step_sizes", tuple(self.step_sizes), threats)

    def gradients_per_batch(self, threats: Threats) -> int:
        """The steps of the one attack."""
        return self.steps

    def losses_per_batch(self, threats: Threats) -> int:
        """One, at the points of the one attack."""
        return 1

    def craft(self, context: ObjectiveContext) -> Points:
        """The points of multi steepest descent, under the name "msd"."""
        sizes: dict[str, float] | None = None
        if self.step_sizes:
            sizes = {norm: float(size) for norm, size in self.step_sizes.items()}
        point = msd_perturb(
            unwrap(context.model),
            context.x,
            context.y,
            {norm: attack.threat for norm, attack in context.attacks.items()},
            steps=self.steps,
            step_sizes=sizes,
            noise=context.noise,
        )
        return {"msd": point}

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean cross entropy at the points."""
        return output_at_shared_points(points, context)
