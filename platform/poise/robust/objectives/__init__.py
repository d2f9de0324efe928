"""The objectives of adversarial training: one class per file, and one line per class in `OBJECTIVES`. See `base`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from poise.robust.objectives.adt import Adt, adt_weights
from poise.robust.objectives.at import At
from poise.robust.objectives.avg import Avg
from poise.robust.objectives.base import (
    AfterStep,
    Attack,
    BoundAttack,
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    State,
)
from poise.robust.objectives.eat import Eat, eat_probabilities
from poise.robust.objectives.fgsm_rs import FgsmRs
from poise.robust.objectives.forward import losses_at, make_output
from poise.robust.objectives.gradalign import GradAlign
from poise.robust.objectives.mart import Mart
from poise.robust.objectives.max import Max
from poise.robust.objectives.mix import Mix
from poise.robust.objectives.msd import Msd
from poise.robust.objectives.projection import GradientProjection
from poise.robust.objectives.ramp import Ramp
from poise.robust.objectives.sat import Sat
from poise.robust.objectives.trades import Trades
from poise.spec.registry import union_of

__all__ = [
    "OBJECTIVES",
    "AfterStep",
    "Attack",
    "BoundAttack",
    "GradientProjection",
    "Objective",
    "ObjectiveContext",
    "ObjectiveOutput",
    "ObjectiveSpec",
    "Points",
    "State",
    "adt_weights",
    "eat_probabilities",
    "losses_at",
    "make_output",
]

OBJECTIVES: Mapping[str, type[Objective]] = {
    "at": At,
    "trades": Trades,
    "mart": Mart,
    "avg": Avg,
    "max": Max,
    "sat": Sat,
    "msd": Msd,
    "mix": Mix,
    "adt": Adt,
    "eat": Eat,
    "ramp": Ramp,
    "fgsm_rs": FgsmRs,
    "gradalign": GradAlign,
}
"""The class of each objective, by name. `OBJECTIVES["trades"](beta=6)` is an objective with its options."""

if TYPE_CHECKING:
    ObjectiveSpec = Objective
else:
    ObjectiveSpec = union_of(OBJECTIVES, Objective, "poise.objectives")
    """The section `objective` of a spec: one of `OBJECTIVES`, or code of the user or of an installed package."""
