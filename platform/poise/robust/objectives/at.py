"""AT: adversarial training on one threat."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from poise.robust.objectives.base import Objective, ObjectiveContext, ObjectiveOutput, Points, require_one_threat
from poise.robust.objectives.forward import output_at_one_threat
from poise.robust.spec import Threats

__all__ = ["At"]


class At(Objective):
    """Adversarial training on one threat: l_p for the only threat p (Madry et al., 2018)."""

    name: Literal["at"] = Field(default="at", description="mean loss at the adversarial examples of one threat")

    def check(self, threats: Threats) -> None:
        """Exactly one threat."""
        require_one_threat(self.name, threats)

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean cross entropy at the adversarial examples."""
        return output_at_one_threat(points, context)
