"""What a robust section accepts, what it refuses and what it costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from poise.robust.objectives import OBJECTIVES, ObjectiveSpec
from poise.robust.objectives.adt import Adt
from poise.robust.objectives.at import At
from poise.robust.objectives.avg import Avg
from poise.robust.objectives.eat import Eat
from poise.robust.objectives.fgsm_rs import FgsmRs
from poise.robust.objectives.gradalign import GradAlign
from poise.robust.objectives.mart import Mart
from poise.robust.objectives.max import Max
from poise.robust.objectives.mix import Mix
from poise.robust.objectives.msd import Msd
from poise.robust.objectives.ramp import Ramp
from poise.robust.objectives.sat import Sat
from poise.robust.objectives.trades import Trades
from poise.robust.spec import EvaluateSpec, Threats, ThreatSpec

THREATS = Threats.model_validate(
    yaml.safe_load("{l1: {eps: 12, steps: 50, restarts: 2}, linf: {eps: 8/255, steps: 40}, l2: {eps: 0.5, steps: 50}}")
)


def test_threats_are_a_mapping_in_fixed_order() -> None:
    assert list(dict(THREATS)) == list(THREATS.keys()) == ["linf", "l2", "l1"]
    assert [(norm, float(threat.eps)) for norm, threat in THREATS.items()] == [
        ("linf", 8 / 255),
        ("l2", 0.5),
        ("l1", 12),
    ]
    assert len(THREATS) == 3
    with pytest.raises(KeyError):
        Threats(l2=ThreatSpec(eps=0.5))["l1"]


def test_a_section_survives_a_round_through_yaml() -> None:
    threats = Threats.model_validate({"l1": {"eps": "12/1", "sparsity": [5, 20]}, "linf": {"eps": "8/255"}})
    text = yaml.safe_dump(threats.model_dump(mode="json", exclude_none=True))
    assert Threats.model_validate(yaml.safe_load(text)) == threats
    assert "8/255" in text


def test_options_are_those_of_an_attack() -> None:
    assert ThreatSpec(eps="8/255", step_size="2/255").options() == {
        "steps": 10,
        "restarts": 1,
        "random_start": True,
        "step_size": 2 / 255,
    }
    assert ThreatSpec(eps=12, sparsity=3).options()["sparsity"] == 3
    assert ThreatSpec(eps=12).options() == {"steps": 10, "restarts": 1, "random_start": True}
    assert ThreatSpec(eps=12, attack="apgd").options() == {"steps": 10, "restarts": 1, "random_start": False}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "at least one threat"),
        ({"linf": None}, "at least one threat"),
        ({"linf": {}}, "eps"),
        ({"linf": {"eps": -1}}, "greater than or equal to 0"),
        ({"linf": {"eps": "8/0"}}, "divides by zero"),
        ({"linf": {"eps": float("nan")}}, "finite"),
        ({"linf": {"eps": 1e9}}, "less than or equal"),
        ({"linf": {"eps": 0.1, "steps": 0}}, "greater than or equal to 1"),
        ({"linf": {"eps": 0.1, "steps": 1001}}, "less than or equal to 1000"),
        ({"linf": {"eps": 0.1, "steps": 10.0}}, "integer"),
        ({"linf": {"eps": 0.1, "step_size": 0}}, "greater than 0"),
        ({"linf": {"eps": 0.1, "restarts": 0}}, "greater than or equal to 1"),
        ({"linf": {"eps": 0.1, "random_start": "yes"}}, "boolean"),
        ({"linf": {"eps": 0.1, "sparsity": 3}}, "l1 alone"),
        ({"linf": {"eps": 8}}, "eps 8 is more than the linf distance of any two images, 1"),
        ({"linf": {"eps": "8/255", "step_size": 2}}, "step_size 2 is more .* 2/255"),
        ({"linf": {"eps": 0.1, "attack": "fgsm"}}, "'pgd' or 'apgd'"),
        ({"linf": {"eps": 0.1, "attack": "apgd", "step_size": 0.1}}, "apgd chooses its own steps: remove step_size"),
        ({"l1": {"eps": 0.1, "sparsity": [20, 5]}}, "1 <= low <= high"),
        ({"l1": {"eps": 0.1, "sparsity": 0}}, "1 <= low <= high"),
        ({"l1": {"eps": 0.1, "sparsity": [1, 2, 3]}}, "at most 2 items"),
        ({"l0": {"eps": 3}}, "Extra inputs"),
    ],
)
def test_malformed_threats_are_refused(section: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Threats.model_validate(section)


def test_objectives_are_told_apart_by_name() -> None:
    read = TypeAdapter(ObjectiveSpec).validate_python
    assert [type(read({"name": name})) for name in OBJECTIVES] == list(OBJECTIVES.values())
    assert len(OBJECTIVES) == 13
    assert read({"name": "ramp", "projection": None}).projection is None
    assert read({"name": "adt", "weighting": "smoothness", "lag": 0, "floor": "1/1000"}).floor == 1e-3
    for wrong in (
        {"name": "mad"},
        {},
        {"name": "at", "lag": 1},
        {"name": "adt", "lag": 2},
        {"name": "adt", "floor": 0},
        {"name": "trades", "beta": -1},
        {"name": "trades", "spread": 0},
        {"name": "ramp", "projection": 2},
        {"name": "msd", "step_sizes": {"linf": 0}},
        {"name": "fgsm_rs", "step": 0},
    ):
        with pytest.raises(ValidationError):
            read(wrong)


def test_what_cannot_be_trained_together_is_said() -> None:
    one = Threats(l2=ThreatSpec(eps=0.5))
    for objective in (At(), Avg(), Max(), Adt()):
        objective.check(one)
    for objective in (Avg(), Max(), Adt(), Adt(weighting="official_slip")):
        objective.check(THREATS)
    with pytest.raises(ValueError, match=r"exactly one threat and 3 are given \(linf, l2, l1\)"):
        At().check(THREATS)
    with pytest.raises(ValueError, match="all three"):
        Adt(weighting="official_slip").check(one)


LINF = Threats(linf=ThreatSpec(eps="8/255"))
PAIR = Threats(linf=ThreatSpec(eps="8/255"), l1=ThreatSpec(eps=12))


@pytest.mark.parametrize("objective", [At(), Trades(), Mart(), FgsmRs(), GradAlign()])
def test_objectives_of_one_threat_are_given_one(objective: Any) -> None:
    objective.check(LINF)
    with pytest.raises(ValueError, match=rf"`{objective.name}` trains on exactly one threat and 3 are given"):
        objective.check(THREATS)


@pytest.mark.parametrize("objective", [Avg(mode="sequential"), Sat(), Msd(), Mix(), Eat()])
def test_objectives_of_several_threats_take_one_as_well(objective: Any) -> None:
    for threats in (LINF, PAIR, THREATS):
        objective.check(threats)


def test_ramp_is_given_two_threats() -> None:
    Ramp().check(PAIR)
    for threats in (LINF, THREATS):
        with pytest.raises(ValueError, match="exactly two threats"):
            Ramp().check(threats)


@pytest.mark.parametrize(
    ("objective", "threat", "says"),
    [
        (Trades(spread=None), {"random_start": False}, "would stay at the image"),
        (Trades(), {"attack": "apgd"}, "set objective.spread: null"),
        (Mart(), {"attack": "apgd"}, "set objective.spread: null"),
        (Trades(spread=None), {"attack": "apgd"}, "would stay at the image"),
        (FgsmRs(), {"attack": "apgd"}, "one step of its own"),
        (GradAlign(), {"attack": "apgd"}, "one step of its own"),
        (Msd(step_sizes={"l2": 0.1}), {}, "step_sizes are given for l2 and threats for linf"),
    ],
)
def test_an_attack_that_an_objective_cannot_use_is_refused(objective: Any, threat: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        objective.check(Threats(linf=ThreatSpec(eps="8/255", **threat)))


def test_what_the_attack_can_do_is_accepted() -> None:
    apgd = Threats(linf=ThreatSpec(eps="8/255", attack="apgd", random_start=True))
    for objective in (Trades(spread=None), Mart(spread=None), GradAlign(attack="threat"), Eat(), At()):
        objective.check(apgd)
    Mart(spread=None).check(Threats(linf=ThreatSpec(eps="8/255", random_start=False)))


def test_sequential_steps_have_no_weights() -> None:
    with pytest.raises(ValidationError, match="belong to mode `joint`"):
        Avg(mode="sequential", weights={"linf": 0.5, "l1": 0.5})


@pytest.mark.parametrize(
    ("objective", "threats", "attack", "loss"),
    [
        (Adt(), THREATS, 190, 3),
        (Avg(mode="sequential"), THREATS, 190, 3),
        (Sat(), THREATS, 63, 1),
        (Eat(), THREATS, 63, 1),
        (Msd(), THREATS, 50, 1),
        (Mix(), THREATS, 190, 1),
        (At(), LINF, 10, 1),
        (Trades(), LINF, 10, 2),
        (Mart(), LINF, 10, 2),
        (FgsmRs(), LINF, 1, 1),
        (GradAlign(), LINF, 3, 3),
        (GradAlign(attack="threat"), LINF, 12, 3),
        (Ramp(), PAIR, 10, 2),
        (Ramp(projection=None), PAIR, 20, 2),
    ],
)
def test_the_cost_of_a_batch_is_that_of_the_page(objective: Any, threats: Threats, attack: int, loss: int) -> None:
    """l1 50 steps twice, l2 50, linf 40: 190 attack gradients (papers/adversarial.md, section 3)."""
    assert objective.gradients_per_batch(threats) == attack
    assert objective.losses_per_batch(threats) == loss
    sequential = objective == Avg(mode="sequential")
    assert objective.steps_per_batch(threats) == (3 if sequential else 1)


def test_evaluation_defaults_to_all_examples_and_the_training_threats() -> None:
    assert EvaluateSpec() == EvaluateSpec(threats=None, num_examples=None, batch_size=256)
    for wrong in ({"batch_size": 0}, {"num_examples": 0}, {"batch_size": 10**9}):
        with pytest.raises(ValidationError):
            EvaluateSpec.model_validate(wrong)


def test_results_of_attacks_are_read_without_torch() -> None:
    """Results and reports name threats, and looking at runs must be quick."""
    code = "import sys, poise.robust.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "platform"}, check=False).returncode == 0


def test_weights_of_avg_sum_to_one_and_name_the_threats() -> None:
    sixths = Avg.model_validate({"weights": {"linf": "1/6", "l2": "1/3", "l1": 0.5}})
    sixths.check(THREATS)
    with pytest.raises(ValidationError, match="sum to 1, not"):
        Avg.model_validate({"weights": {"linf": 0.4, "l2": 0.5}})
    with pytest.raises(ValueError, match="name the same norms"):
        Avg.model_validate({"weights": {"linf": 0.5, "l2": 0.5}}).check(THREATS)
