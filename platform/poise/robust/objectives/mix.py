"""MIX: adversarial training on the mean of the threats' perturbations."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from poise.robust.objectives.base import Objective, ObjectiveContext, ObjectiveOutput, Points, craft_all
from poise.robust.objectives.forward import output_at_shared_points
from poise.robust.spec import Threats

__all__ = ["Mix"]


class Mix(Objective):
    """Adversarial training on the mean of the threats' perturbations, as in the public code of ADT.

    The mean cross entropy at x + (1/P) sum_p delta_p, delta_p being the perturbation of threat p.
    """

    name: Literal["mix"] = Field(default="mix", description="loss at the mean of the threats' adversarial examples")

    def losses_per_batch(self, threats: Threats) -> int:
        """One, at the mean."""
        return 1

    def craft(self, context: ObjectiveContext) -> Points:
        """The mean of the adversarial examples of every threat, under the name "mix"."""
        of_threats = torch.stack(list(craft_all(context).values()))  # (P, N, ...)
        return {"mix": of_threats.mean(0)}

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean cross entropy at the mean points."""
        return output_at_shared_points(points, context)
