"""MAX: adversarial training on the worst threat of each example."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from poise.robust.objectives.base import Objective, ObjectiveContext, ObjectiveOutput, Points
from poise.robust.objectives.forward import losses_at, make_output, share_of_worst

__all__ = ["Max"]


class Max(Objective):
    """Adversarial training on the worst threat of each example: (1/N) sum_i max_p l_{p,i} (Tramer and Boneh, 2019).

    The worst threat is chosen by the losses of the P training forwards themselves, not by an extra forward in eval
    mode. So what is minimised is exactly the maximum, and it is never below any l_p.
    """

    name: Literal["max"] = Field(default="max", description="per example, the largest of the threats' losses")

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean over examples of the largest loss."""
        losses, correct = losses_at(points, context)  # (P, N) each
        worst = losses.max(dim=0)  # over threats: values and indices (N,)
        shares = share_of_worst(worst.indices, losses)
        return make_output(context, worst.values.mean(), losses, correct, tuple(points), shares)
