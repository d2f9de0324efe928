"""What adversarial training minimises, by name. Each objective is a function of one batch; see `play`."""

from __future__ import annotations

from typing import Any

from poise.robust.objective_spec import Adt
from poise.robust.objectives.norms import adt, adt_weights, at, avg, initial_weights, max
from poise.robust.objectives.play import Attack, Objective, Outcome, Play, State

__all__ = ["OBJECTIVES", "Attack", "Objective", "Outcome", "Play", "State", "adt_weights", "initial_state"]

OBJECTIVES: dict[str, Objective] = {"at": at, "avg": avg, "max": max, "adt": adt}


def initial_state(options: Any, norms: tuple[str, ...]) -> State:
    """What an objective remembers before the first batch: nothing, for most."""
    return initial_weights(options, norms) if isinstance(options, Adt) else {}
