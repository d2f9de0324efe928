"""A section that is written in another natural form is answered with the form that is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from poise.kinds import KINDS
from poise.spec import SpecError, load

EVALUATE = {"kind": "robust.evaluate", "name": "judged", "model": {"run": "x"}}


def refused(values: dict[str, Any]) -> str:
    Path("spec.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(SpecError) as caught:
        load(Path("spec.yaml"), KINDS)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("attack", ["autoattack", "msd"])
@pytest.mark.parametrize(
    ("threats", "example"),
    [
        ({"linf": {"eps": "4/255"}}, "{linf: 4/255}"),
        ({"linf": {"eps": "4/255", "steps": 3}, "l2": 0.5}, "{linf: 4/255, l2: 0.5}"),
        ({"norm": "l2", "eps": 0.5}, "{l2: 0.5}"),
        ([{"norm": "l2", "eps": 0.5}, {"linf": "1/255"}], "{l2: 0.5, linf: 1/255}"),
        (["linf", "l1"], "{linf: 8/255, l1: 8/255}"),
        ("linf", "{linf: 8/255}"),
        ("4/255", "{linf: 4/255}"),
        (0.03, "{linf: 0.03}"),
        ({"linf": None}, "{linf: 8/255}"),
        ({}, "{linf: 8/255}"),
        (None, "{linf: 8/255}"),
    ],
)
def test_threats_in_another_form_are_shown_in_the_accepted_one(attack, threats, example):
    message = refused({**EVALUATE, "attacks": [{"attack": attack, "threats": threats}]})
    assert f"attacks[0].threats: needs a radius for each norm: write `threats: {example}`" in message
    assert "1 mistake;" in message
    accepted = yaml.safe_load(example)
    KINDS["robust.evaluate"].model_validate({**EVALUATE, "attacks": [{"attack": attack, "threats": accepted}]})


def test_one_threat_for_several_balls_is_shown_as_threats():
    stage = {"attack": "autoattack", "threat": {"norm": "l2", "eps": 0.5}}
    assert "attacks[0].threats: needs a radius for each norm: write `threats: {l2: 0.5}`" in refused(
        {**EVALUATE, "attacks": [stage]}
    )


@pytest.mark.parametrize("kind", ["calibrate.measure", "align.selfplay", "finetune.sft"])
def test_a_language_model_that_is_a_word_is_shown_as_folder_or_run(kind):
    values = {"kind": kind, "name": "one", "model": "small-llama"}
    assert "model: needs a section: write `{run: small-llama}` or `{folder: small-llama}`, got" in refused(values)
    Path("small-llama").mkdir()
    assert "model: needs a section: write `{folder: small-llama}` or `{run: small-llama}`, got" in refused(values)
    assert "write `{folder: models/llama}`, got" in refused({**values, "model": "models/llama"})


def test_a_classifier_that_is_a_word_is_shown_as_what_it_is():
    attacks = [{"attack": "fgsm", "threat": {"norm": "linf", "eps": 0.1}}]
    values = {**EVALUATE, "data": {"name": "digits"}, "attacks": attacks}
    assert "write `{function: 'mine:make'}` or" in refused({**values, "model": "mine:make"})
    assert "write `{run: net.safetensors}` or `{file: net.safetensors}`" in refused(
        {**values, "model": "net.safetensors"}
    )
    Path("net.safetensors").write_text("")
    assert "write `{file: net.safetensors}` or `{run:" in refused({**values, "model": "net.safetensors"})
