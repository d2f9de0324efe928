"""AVG: adversarial training on the mean of the threats."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from poise.robust.objectives.base import (
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    check_same_norms,
    craft_all,
    craft_one,
)
from poise.robust.objectives.forward import losses_at, make_output, output_at_one_threat
from poise.robust.spec import Norm, Threats
from poise.spec import ExactNumber

__all__ = ["Avg"]


class Avg(Objective):
    """Adversarial training on the mean of the threats: (1/P) sum_p l_p (Tramer and Boneh, 2019).

    With `weights`, sum_p w_p l_p. In mode "sequential", as in the public multi-norm codes, optimizer step s is one on
    the (s mod P)-th of the threats l1, l2, linf alone. The caller passes each batch P times, so that each attack meets
    the model as the step before it left it.
    """

    name: Literal["avg"] = Field(default="avg", description="mean of the adversarial losses of all threats")
    mode: Literal["joint", "sequential"] = Field(
        default="joint", description="one optimizer step on the mean, or one per threat, attacked after the one before"
    )
    weights: dict[Norm, Annotated[ExactNumber, Field(ge=0, le=1)]] | None = Field(
        default=None,
        description="joint only: weight of each threat in the mean, by norm, summing to 1; default: equal weights",
    )

    @model_validator(mode="after")
    def _sums_to_one(self) -> Avg:
        if not self.weights:
            return self
        total = Fraction(sum(weight.exact for weight in self.weights.values()))
        if abs(total - 1) > 1e-6:
            raise ValueError(f"weights sum to 1, not {float(total):.6g}; fractions such as 1/3 are exact")
        if self.mode == "sequential":
            raise ValueError("weights belong to mode `joint`: remove them, sequential steps are all of one size")
        return self

    def check(self, threats: Threats) -> None:
        """The weights, if there are any, are those of the threats."""
        if self.weights:
            check_same_norms("weights", tuple(self.weights), threats)

    def steps_per_batch(self, threats: Threats) -> int:
        """One, or in mode "sequential" one for each threat."""
        return len(threats) if self.mode == "sequential" else 1

    def craft(self, context: ObjectiveContext) -> Points:
        """The adversarial examples of every threat; in mode "sequential" of the threat whose turn it is."""
        if self.mode == "joint":
            return craft_all(context)
        backwards = tuple(context.attacks)[::-1]  # l1, l2, linf
        return craft_one(context, backwards[context.step % len(backwards)])

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The weighted mean of l_p, or l_p alone."""
        if self.mode == "sequential":
            return output_at_one_threat(points, context)
        losses, correct = losses_at(points, context)  # (P, N) each
        per_threat = losses.mean(1)  # (P,)
        shares = dict.fromkeys(points, 1 / len(points))
        for norm, share in (self.weights or {}).items():
            shares[norm] = float(share)
        weights = torch.tensor(list(shares.values()), device=context.x.device)  # (P,), in the order of the points
        loss = (weights * per_threat).sum() if self.weights else per_threat.mean()
        return make_output(context, loss, losses, correct, tuple(points), weights)
