"""The objectives of adversarial training, by name. Each is a function of one batch; see `base`."""

from __future__ import annotations

from typing import Any

from poise.robust.objective_spec import Adt, Eat
from poise.robust.objectives.base import Attack, Objective, ObjectiveInput, ObjectiveOutput, State
from poise.robust.objectives.clean import mart, trades
from poise.robust.objectives.eat import eat, eat_probabilities, initial_errors
from poise.robust.objectives.fast import fgsm_rs, gradalign
from poise.robust.objectives.joint import mix, msd, sat
from poise.robust.objectives.norms import adt, adt_weights, at, avg, initial_weights, max
from poise.robust.objectives.projection import GradientProjection
from poise.robust.objectives.ramp import ramp

__all__ = [
    "OBJECTIVES",
    "Attack",
    "GradientProjection",
    "Objective",
    "ObjectiveInput",
    "ObjectiveOutput",
    "State",
    "adt_weights",
    "eat_probabilities",
    "initial_state",
]

OBJECTIVES: dict[str, Objective] = {
    "at": at,
    "trades": trades,
    "mart": mart,
    "avg": avg,
    "max": max,
    "sat": sat,
    "msd": msd,
    "mix": mix,
    "adt": adt,
    "eat": eat,
    "ramp": ramp,
    "fgsm_rs": fgsm_rs,
    "gradalign": gradalign,
}


def initial_state(options: Any, norms: tuple[str, ...]) -> State:
    """The state of an objective before the first batch; empty for most objectives."""
    if isinstance(options, Eat):
        return initial_errors(len(norms))
    if isinstance(options, Adt):
        return initial_weights(options, norms)
    return {}
