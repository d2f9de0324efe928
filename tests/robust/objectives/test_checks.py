"""What an objective of the user returns is checked before it is used; messages name the method, file and line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from poise.errors import UserError
from poise.robust.attacks import perturb
from poise.robust.objectives import (
    OBJECTIVES,
    BoundAttack,
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    losses_at,
    make_output,
)
from poise.robust.objectives.checks import compute_loss, craft_points, first_state
from poise.robust.threats import Threat
from poise.robust.training.awp import WeightPerturbation

Change = Callable[[ObjectiveOutput, Tensor], Any]


class Mine(Objective):
    """The mean cross entropy, whose output `CHANGE` spoils."""

    gamma: float = Field(0.0)

    def loss(self, points: Points, context: ObjectiveContext) -> Any:
        losses, correct = losses_at(points, context)
        weights = losses.new_full((len(points),), 1 / len(points))
        output = make_output(context, losses.mean(), losses, correct, tuple(points), weights)
        return CHANGE["output"](output, losses) if CHANGE else output


CHANGE: dict[str, Change] = {}


def change(output: ObjectiveOutput, **changes: Any) -> ObjectiveOutput:
    return ObjectiveOutput(**{"loss": output.loss, "metrics": output.metrics, "state": output.state, **changes})


@pytest.fixture
def context() -> ObjectiveContext:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    attacks = {norm: BoundAttack(Threat(norm, 0.1), {"steps": 1}, perturb) for norm in ("linf", "l2")}
    return ObjectiveContext(model, torch.rand(5, 1, 2, 2), torch.arange(5) % 3, attacks, first_state(Mine(), ()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda output, losses: losses.mean(), r"Mine.loss returned a tensor of shape \(\): it must return an Obj"),
        (lambda output, losses: None, "Mine.loss returned None: it must return an ObjectiveOutput"),
        (
            lambda output, losses: change(output, loss=losses[0]),
            r"Mine.loss: ObjectiveOutput.loss is a tensor of shape \(5,\): it must be a scalar tensor with a gradient",
        ),
        (lambda output, losses: change(output, loss=output.loss.detach()), "ObjectiveOutput.loss has no gradient"),
        (lambda output, losses: change(output, metrics={"x": 0.5}), r"metrics\['x'\] is a float: it must be a tensor"),
        (lambda output, losses: change(output, metrics={"x": losses.detach()[0, :3]}), r"shape \(3,\): it must be a s"),
        (lambda output, losses: change(output, metrics={"x": losses.mean()}), r"metrics\['x'\] has a gradient"),
        (lambda output, losses: change(output, metrics={"loss": losses.mean().detach()}), "the loss itself has this n"),
        (lambda output, losses: change(output, metrics=None), "metrics is None: it must be a mapping"),
        (lambda output, losses: change(output, state={"mean": 0.5}), r"state\['mean'\] is a float"),
        (lambda output, losses: change(output, state={"mean": losses.mean()}), r"state\['mean'\] has a gradient"),
    ],
)
def test_a_wrong_output_is_named_with_the_line_of_the_method(context, monkeypatch, spoil, message):
    monkeypatch.setitem(CHANGE, "output", spoil)
    for call in (compute_loss, WeightPerturbation(context.model, 0.01).loss):
        with pytest.raises(UserError, match=message) as caught:
            call(Mine(), craft_points(Mine(), context), context)
        assert "test_checks.py:" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"weights": torch.ones(5)},
            r"make_output: weights \(5,\); it must be \(P,\), one for each of the P = 2 norms",
        ),
        ({"losses": torch.ones(5)}, r"losses \(5,\) and correct \(2, 5\); both must be \(P, N\)"),
        ({"correct": torch.ones(5, 2)}, r"correct \(5, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_the_norms_are_refused(context, arguments, message):
    values = {"losses": torch.ones(2, 5), "correct": torch.ones(2, 5), "weights": torch.ones(2), **arguments}
    with pytest.raises(UserError, match=message):
        make_output(context, torch.tensor(1.0), norms=("linf", "l2"), **values)


def test_an_exception_in_a_method_is_one_line_with_its_source(context):
    class Broken(Mine):
        def loss(self, points: Points, context: ObjectiveContext) -> Any:
            return points["l1"]

        def craft(self, context: ObjectiveContext) -> Points:
            return {"linf": [1.0]}

        def initial_state(self, norms: Any) -> Any:
            return [0.0]

    with pytest.raises(UserError, match=r"Broken.loss raised KeyError: 'l1' \(.*in loss: return points\[\"l1\"\]\)"):
        compute_loss(Broken(), {}, context)
    with pytest.raises(UserError, match=r"Broken.craft\['linf'\] is a list: it must be a tensor"):
        craft_points(Broken(), context)
    with pytest.raises(UserError, match=r"Broken.initial_state is a list: it must be a mapping"):
        first_state(Broken(), ())


def test_the_call_changes_nothing_for_objectives_of_poise(context):
    objective = OBJECTIVES["avg"]()
    points = craft_points(objective, context)
    checked = compute_loss(objective, points, context)
    plain = objective.loss(points, context)
    assert torch.equal(checked.loss, plain.loss)
    assert checked.metrics == plain.metrics
    with pytest.raises(AttributeError):  # an error in code of Poise keeps its traceback
        compute_loss(objective, None, context)


def test_a_class_needs_no_name_in_a_notebook():
    assert Mine(gamma=1.0).name == "Mine"
    assert Mine(name="other").name == "other"
    assert Mine(gamma=0.0).model_dump() == {"name": "Mine", "gamma": 0.0}

    class Declared(OBJECTIVES["avg"]):
        name: str

    class Named(Mine):
        name: str = "named"

    assert Declared().name == "Declared"
    assert Named().name == "named"
    assert OBJECTIVES["at"]().name == "at"
