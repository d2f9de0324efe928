"""E-AT: one threat per batch, drawn in proportion to its robust error so far."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from poise.robust.objectives.base import (
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    State,
    craft_one,
    gradients_of_one_draw,
)
from poise.robust.objectives.forward import output_at_one_threat
from poise.robust.spec import Threats

__all__ = ["Eat", "eat_probabilities"]


class Eat(Objective):
    """Adversarial training on one threat per batch, drawn in proportion to its robust error so far.

    l_p for one p per batch, with probability proportional to e_p (E-AT, Croce and Hein, 2022). e_p is the share of
    wrongly classified examples among all that were trained on under p so far, over all ranks and never reset. The
    probabilities are uniform until every threat has been drawn. The paper takes linf and l1, whose hull nearly contains
    l2, and APGD of ten steps from the image itself.
    """

    name: Literal["eat"] = Field(
        default="eat", description="loss under one threat per batch, drawn in proportion to its robust error so far"
    )

    def gradients_per_batch(self, threats: Threats) -> int:
        """The mean over threats of steps times restarts; the probabilities are not known before the run."""
        return gradients_of_one_draw(threats)

    def losses_per_batch(self, threats: Threats) -> int:
        """One, under the drawn threat."""
        return 1

    def initial_state(self, norms: Sequence[str]) -> State:
        """Summed error rates, and number of batches, of each threat (P,)."""
        return {
            "errors": torch.zeros(len(norms), dtype=torch.double),
            "batches": torch.zeros(len(norms), dtype=torch.double),
        }

    def craft(self, context: ObjectiveContext) -> Points:
        """The adversarial examples of the drawn threat."""
        norms = tuple(context.attacks)
        thresholds = list(accumulate(eat_probabilities(context.state).tolist()))
        # rounding may leave the last threshold below the draw
        index = min(bisect(thresholds, context.draw), len(norms) - 1)
        return craft_one(context, norms[index])

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean cross entropy under the drawn threat, and the errors with those of this batch."""
        (norm,) = points
        output = output_at_one_threat(points, context)
        error = context.mean(1 - output.metrics[f"robust/{norm}"].double().view(1))
        probabilities = eat_probabilities(context.state)  # (P,)
        norms = tuple(context.attacks)
        one_hot = torch.zeros_like(probabilities)
        one_hot[norms.index(norm)] = 1
        state = {
            "errors": context.state["errors"] + one_hot * error,
            "batches": context.state["batches"] + one_hot,
        }
        chances = {f"chance/{each}": chance for each, chance in zip(norms, probabilities, strict=True)}
        return ObjectiveOutput(output.loss, output.metrics | chances, state)


def eat_probabilities(state: State) -> Tensor:
    """The probability of each threat (P,), float64."""
    rates = state["errors"] / state["batches"].clamp(min=1)
    every_threat_drawn = (state["batches"] > 0).all() & (rates.sum() > 0)
    rates = torch.where(every_threat_drawn, rates, torch.ones_like(rates))
    return rates / rates.sum()
