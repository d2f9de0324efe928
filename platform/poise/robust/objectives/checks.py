"""The calls of an objective's methods in training, with a check of what they return: the class may be of the user."""

from __future__ import annotations

from collections.abc import Sequence

from poise.method_output import describe, require_loss, require_metrics, require_tensors
from poise.robust.objectives.base import Objective, ObjectiveContext, ObjectiveOutput, Points, State
from poise.user_code import MethodOutputError, explain_method

__all__ = ["compute_loss", "craft_points", "first_state"]


def first_state(objective: Objective, norms: Sequence[str]) -> State:
    """The state before the first batch, see `Objective.initial_state`. UserError unless it maps names to tensors."""
    with explain_method(objective, "initial_state"):
        state = objective.initial_state(norms)
        require_tensors(f"{objective.name}.initial_state", state)
    return state


def craft_points(objective: Objective, context: ObjectiveContext) -> Points:
    """The adversarial points of a batch, see `Objective.craft`. UserError unless they are detached tensors by name."""
    with explain_method(objective, "craft"):
        points = objective.craft(context)
        require_tensors(f"{objective.name}.craft", points)
    return points


def compute_loss(objective: Objective, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
    """The output of a batch, see `Objective.loss`.

    Raises:
        UserError: the method returned no ObjectiveOutput, or one whose loss is not a scalar with a gradient, whose
            metrics are not detached scalars, or whose state is not of detached tensors.
    """
    with explain_method(objective, "loss"):
        output = objective.loss(points, context)
        method = f"{objective.name}.loss"
        if not isinstance(output, ObjectiveOutput):
            raise MethodOutputError(
                f"{method} returned {describe(output)}: it must return an ObjectiveOutput, see make_output"
            )
        require_loss(f"{method}: ObjectiveOutput.loss", output.loss, ())
        require_metrics(f"{method}: ObjectiveOutput.metrics", output.metrics)
        require_tensors(f"{method}: ObjectiveOutput.state", output.state)
    return output
