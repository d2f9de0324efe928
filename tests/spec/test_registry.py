"""Methods of the user's code and of installed packages: found by name, validated, dumped, and named where they fail."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from poise import plugins
from poise.align.selfplay import METHODS, SelfPlayMethod
from poise.cli import cli
from poise.engine.lifecycle import spec_hash
from poise.errors import UserError
from poise.kinds import KINDS
from poise.spec import RunSpec, dump, json_schema
from poise.spec.registry import resolve
from poise.store.inputs import read_inputs
from poise.store.runs import open_run
from poise.user_code import allow_code

MODULE = """\
import torch
from pydantic import Field, model_validator

from poise.robust.objectives import Objective
from poise.robust.objectives.trades import Trades
from poise.robust.objectives.forward import losses_at, make_output
from poise.spec import field_error


class Focal(Objective):
    gamma: float = Field(2.0, ge=0)

    @model_validator(mode="after")
    def _not_seven(self):
        if self.gamma == 7:
            raise field_error("gamma", "7 is not wanted")
        return self

    def check(self, threats):
        if len(threats) > 2:
            raise ValueError("focal takes two threats at most")

    def gradients_per_batch(self, threats):
        return 12345

    def loss(self, points, context):
        losses, correct = losses_at(points, context)
        focal = (1 - torch.exp(-losses)) ** self.gamma * losses
        weights = torch.full((len(points),), 1 / len(points))
        return make_output(context, focal.mean(), focal, correct, tuple(points), weights)


class Unfinished(Objective):
    pass


class Other:
    pass


class Renamed(Trades):
    pass
"""
TRAIN: dict[str, Any] = {
    "kind": "robust.train",
    "name": "mine",
    "model": {"name": "cnn", "width": 4},
    "data": {"name": "digits", "limit": 200, "validation": 40, "batch_size": 20},
    "threats": {"linf": {"eps": 0.05, "steps": 2}},
    "objective": {"name": "lab_methods:Focal", "gamma": 1.5},
    "train": {"steps": 6},
    "evaluate": {"num_examples": 20},
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POISE_ALLOW_CODE", raising=False)
    (tmp_path / "lab_methods.py").write_text(MODULE)
    yield
    sys.modules.pop("lab_methods", None)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts a distribution with entry points on Python's path, as an installer would."""

    def write(entry_points: str) -> None:
        info = tmp_path / "mylab-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mylab\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(str(tmp_path))
        plugins._entry_points.cache_clear()

    yield write
    plugins._entry_points.cache_clear()


def poise(command: str, values: dict[str, Any], *options: str) -> Result:
    Path("spec.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return CliRunner().invoke(cli, [command, "spec.yaml", *options])


def changed(**objective: Any) -> dict[str, Any]:
    return {**TRAIN, "objective": {**TRAIN["objective"], **objective}}


def valid(values: dict[str, Any]) -> RunSpec:
    return KINDS["robust.train"].model_validate(values)


def test_a_method_is_refused_without_the_permission_and_its_options_are_left_open():
    refused = poise("run", TRAIN, "--engine", "local")
    assert "objective.name: lab_methods:Focal runs code of the module lab_methods" in str(refused.exception)
    assert str(refused.exception).startswith("spec.yaml:")
    checked = poise("check", changed(gamma="not looked at"))
    assert checked.exit_code == 0, checked.exception
    assert "its options were not validated" in checked.output
    assert "lab_methods" not in sys.modules
    misspelt = poise("check", changed(name="lab_methods:Fokal"))
    misspelling = "objective.name: module 'lab_methods' defines no 'Fokal'; did you mean 'Focal'?"
    assert misspelling in str(misspelt.exception)
    misspelt = poise("check", changed(name="lab_methods:Fokal"), "--allow-code")
    assert misspelling in str(misspelt.exception)


def test_a_cost_that_code_decides_is_not_guessed():
    checked = poise("check", TRAIN)
    assert "# the cost depends on code of yours: it is known when the code is allowed" in checked.output
    assert "gradients per batch" not in checked.output


def test_options_are_validated_by_the_users_class_with_file_and_line():
    assert "12345 for attacks" in poise("check", TRAIN, "--allow-code").output
    for objective, message in {
        "gamma": "must be greater than or equal to 0, got -1",
        "gama": "unknown key; did you mean 'gamma'?",
    }.items():
        result = poise("check", changed(**{objective: -1}), "--allow-code")
        (line,) = [n for n, text in enumerate(Path("spec.yaml").read_text().splitlines(), 1) if f"{objective}:" in text]
        assert f"spec.yaml:{line}: objective.{objective}: {message}" in str(result.exception)
    assert "objective.gamma: 7 is not wanted" in str(poise("check", changed(gamma=7), "--allow-code").exception)
    three = {norm: {"eps": 0.1} for norm in ("linf", "l2", "l1")}
    result = poise("check", {**TRAIN, "threats": three}, "--allow-code")
    assert "threats: focal takes two threats at most" in str(result.exception)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Unfinished", "does not define loss, which Objective leaves to it"),
        ("Renamed", "inherits the name of another method: write `name: str` in the class"),
        ("Other", "is not a subclass of poise.robust.objectives.base.Objective"),
    ],
)
def test_a_class_of_another_form_is_refused(name, message):
    result = poise("check", changed(name=f"lab_methods:{name}"), "--allow-code")
    assert f"objective.name: lab_methods:{name} {message}" in str(result.exception)


def test_an_error_while_a_module_is_imported_has_its_line():
    Path("lab_methods.py").write_text("x = 1\nraise RuntimeError('no such library')\n")
    result = poise("check", TRAIN, "--allow-code")
    assert "RuntimeError: no such library (lab_methods.py:2)" in str(result.exception)


def test_an_unknown_name_is_answered_with_the_names_that_there_are():
    assert "objective: 'trade' is not valid; did you mean 'trades'?" in str(
        poise("check", changed(name="trade")).exception
    )


def test_a_spec_with_a_method_of_the_users_is_dumped_hashed_and_sent_as_any_other():
    with allow_code():
        spec = valid(TRAIN)
        assert yaml.safe_load(dump(spec))["objective"] == {"name": "lab_methods:Focal", "gamma": 1.5}
        assert valid(yaml.safe_load(dump(spec))) == spec
        assert spec_hash(spec) != spec_hash(valid(changed(gamma=1.0)))
        assert pickle.loads(pickle.dumps(spec)) == spec
        assert [(each.where, each.kind, each.place) for each in spec.inputs()] == [
            ("objective.name", "code", "lab_methods:Focal")
        ]


def test_a_class_without_a_colon_has_a_hint():
    message = str(poise("check", changed(name="lab_methods.Focal")).exception)
    hint = "code of yours is named with a colon, as 'lab_methods:Focal'"
    assert f"objective.name: 'lab_methods.Focal' is not valid; {hint}" in message


def test_a_sweep_over_its_options_asks_for_the_permission():
    base = {key: value for key, value in TRAIN.items() if key != "name"}
    sweep = {"kind": "sweep", "name": "s", "base": base, "metric": "robust/union", "mode": "max"}
    sweep["space"] = {"objective.gamma": {"grid": [0.1, 0.9]}}
    refused = poise("run", sweep, "--engine", "local")
    assert "objective.name: lab_methods:Focal runs code of the module lab_methods" in str(refused.exception)
    assert "means the same" not in str(refused.exception)


def test_it_can_be_varied_by_a_sweep():
    base = {key: value for key, value in TRAIN.items() if key != "name"}
    sweep = {"kind": "sweep", "name": "s", "base": base, "metric": "robust/union", "mode": "max"}
    space = {"objective": {"grid": [{"name": "at"}, {"name": "lab_methods:Focal"}]}, "seed": {"grid": [0, 1]}}
    result = poise("check", {**sweep, "space": space}, "--allow-code")
    assert result.exit_code == 0, result.exception
    result = poise("check", {**sweep, "space": {"objective.gamma": {"grid": [1.0, -1.0]}}}, "--allow-code")
    assert "space.objective.gamma.grid[1]: must be greater than or equal to 0, got -1.0" in str(result.exception)


SECTIONS = """\
from torch import Tensor

from poise.align.oracles import OracleOptions
from poise.align.selfplay import SelfPlayMethod
from poise.calibrate.clustering import Clusterer, Clusters
from poise.finetune.losses import FinetuneLoss
from poise.models.tuning import Full


class Rock(OracleOptions):
    @property
    def rows(self):
        return [[0.5, 1.0], [0.0, 0.5]]


class Wins(SelfPlayMethod):
    def advantage(self, preference: Tensor) -> Tensor:
        return preference.mean(2)


class First(Clusterer):
    def cluster(self, question, answers):
        return Clusters(tuple(0 for _ in answers), (answers[0],))


class Sum(FinetuneLoss):
    def loss(self, logits, labels, *, normalizer=None):
        return logits.sum()


class Head(Full):
    name: str


class Opponents(Wins):
    def num_opponents(self):
        return 2
"""
"""A class of the user's for every section of a spec that stands for a method, but the objective."""


@pytest.mark.parametrize(
    ("kind", "field", "name"),
    [
        ("align.selfplay", "oracle", "Rock"),
        ("align.selfplay", "method", "Wins"),
        ("calibrate.measure", "clustering", "First"),
        ("finetune.sft", "loss", "Sum"),
        ("finetune.sft", "tuning", "Head"),
    ],
)
def test_every_section_that_stands_for_a_method_takes_a_class_of_the_users(kind, field, name):
    Path("lab_methods.py").write_text(SECTIONS)
    world = {"name": "world", "split": "prefer"}
    trained = {"train": {"steps": 1, "checkpoint": {"every": {"steps": 1}}, "evaluate_every": {"steps": 1}}}
    values: dict[str, Any] = {
        "align.selfplay": {"questions": world, "oracle": {"name": "cyclic"}, "method": {"name": "nash_rs"}, **trained},
        "calibrate.measure": {"questions": {"name": "world"}},
        "finetune.sft": {"data": {"name": "world"}, **trained},
    }[kind]
    values = {"kind": kind, "name": "mine", "model": {"run": "base"}, **values, field: {"name": f"lab_methods:{name}"}}
    unchecked = KINDS[kind].model_validate(values)
    assert [each.place for each in unchecked.inputs() if each.kind == "code"] == [f"lab_methods:{name}"]
    with allow_code():
        spec = KINDS[kind].model_validate(values)
    assert type(getattr(spec, field)).__name__ == name
    assert KINDS[kind].model_validate(yaml.safe_load(dump(unchecked))) == unchecked


def test_a_method_that_has_to_be_a_property_is_named():
    Path("lab_methods.py").write_text(SECTIONS)
    with allow_code(), pytest.raises(UserError, match=r"Opponents.num_opponents is a method and has to be a property"):
        resolve("lab_methods:Opponents", METHODS, SelfPlayMethod, "poise.selfplay")


def test_a_sweep_may_choose_by_the_metrics_that_a_method_declares():
    loss = "    def loss(self, points"
    declaration = "    @property\n    def training_metrics(self):\n        return ('running/adversarial',)\n\n"
    Path("lab_methods.py").write_text(MODULE.replace(loss, declaration + loss, 1))
    base = {key: value for key, value in TRAIN.items() if key != "name"}
    sweep = {"kind": "sweep", "name": "s", "base": base, "mode": "min", "space": {"seed": {"grid": [0, 1]}}}
    for options in ((), ("--allow-code",)):
        result = poise("check", {**sweep, "metric": "running/adversarial"}, *options)
        assert result.exit_code == 0, result.exception
    unknown = poise("check", {**sweep, "metric": "running/adverse"}, "--allow-code")
    assert "measures no 'running/adverse'; did you mean 'running/adversarial'?" in str(unknown.exception)


# --- installed packages


def test_an_installed_package_registers_a_method_by_its_plain_name(install):
    install("[poise.objectives]\nfocal = lab_methods:Focal\n")
    result = poise("run", changed(name="focal"), "--engine", "local")
    assert result.exit_code == 0, result.exception
    run = Path("runs/mine")
    assert json.loads((run / "result.json").read_text())["objective"] == "focal"
    assert json.loads((run / "environment.json").read_text())["packages"]["mylab"] == "1.2"
    (record,) = read_inputs(open_run("runs", "mine")).values()
    assert (record.where, record.place, record.file) == ("objective.name", "lab_methods:Focal", "lab_methods.py")
    Path("lab_methods.py").write_text(MODULE.replace("12345", "12346"))
    refused = poise("run", changed(name="focal"), "--engine", "local")
    assert "objective.name: lab_methods.py has changed" in str(refused.exception)
    Path("lab_methods.py").write_text(MODULE)
    assert "objective: 'fokal' is not valid; did you mean 'focal'?" in str(
        poise("check", changed(name="fokal")).exception
    )
    section = json_schema(KINDS["robust.train"], "robust.train")["properties"]["objective"]
    assert '{"const": "focal"}' in json.dumps(section)


def test_what_cannot_be_loaded_breaks_nothing_until_it_is_named(install):
    install("[poise.objectives]\nlost = no_such_module:Focal\n[poise.kinds]\nmylab.lost = lab_methods:Focal\n")
    result = poise("check", changed(name="at", gamma=None) | {"objective": {"name": "at"}})
    assert result.exit_code == 0, result.exception
    for text in (result.output, CliRunner().invoke(cli, ["--version"]).output):
        assert re.search(
            r"warning: poise.objectives 'lost': no_such_module:Focal, .* package mylab .* cannot be loaded", text
        )
    refused = poise("check", changed(name="lost"))
    assert "objective.name: no_such_module:Focal, which the package mylab registers, cannot be loaded" in str(
        refused.exception
    )
    refused = poise("check", {**TRAIN, "kind": "mylab.lost"})
    assert "spec.yaml:1: kind: the kind 'mylab.lost' of an installed package is a " in str(refused.exception)
    assert "robust.train" in KINDS
    assert "mylab.lost" not in list(KINDS)
