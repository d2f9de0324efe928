"""Stored models are compared by the headers of their files with what the spec or their config says they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from poise.errors import UserError
from poise.kinds import KINDS
from poise.kinds.check import FieldError, find_errors
from poise.models.build import build
from poise.models.examine import examine_folder
from poise.models.shapes import check_shapes
from poise.models.spec import ModelSpec

EVALUATE = {
    "kind": "robust.evaluate",
    "name": "judged",
    "data": {"name": "digits"},
    "attacks": [{"attack": "fgsm", "threat": {"norm": "linf", "eps": 0.1}}],
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def mistakes_of(values: dict[str, Any]) -> list[FieldError]:
    return find_errors(KINDS[values["kind"]].model_validate(values))


def save_network(file: str, prefix: str = "", **spec: Any) -> dict[str, Any]:
    """Save the state dict of a network for the digits; the section of a spec that describes it."""
    network = build(ModelSpec(**spec), shape=(1, 8, 8), classes=10, mean=(0.0,), std=(1.0,), seed=0)
    save_file({prefix + key: value.contiguous() for key, value in network.state_dict().items()}, file)
    return {**spec, "file": file}


@pytest.mark.parametrize("name", ["cnn", "resnet18", "preact_resnet18", "wrn_28_10", "vgg11"])
def test_the_state_dict_of_its_own_architecture_is_no_mistake(name):
    assert mistakes_of({**EVALUATE, "model": save_network("own.safetensors", name=name, width=4)}) == []
    wrapped = save_network("wrapped.safetensors", "module.", name=name, width=4)
    assert mistakes_of({**EVALUATE, "model": wrapped}) == []


def test_a_state_dict_of_another_network_is_named_by_its_first_parameters():
    model = save_network("other.safetensors", name="cnn", width=4)
    (mistake,) = mistakes_of({**EVALUATE, "model": {**model, "width": 8}})
    assert mistake.path == ("model", "file")
    assert "other.safetensors is not the state dict of this cnn" in mistake.message
    assert "body.0.weight is [4, 1, 4, 4], not [8, 1, 4, 4]" in mistake.message
    (mistake,) = mistakes_of({**EVALUATE, "model": {**model, "name": "resnet18"}})
    assert "missing (" in mistake.message
    bounds = {"kind": "bounds.report", "name": "bounded", "data": {"name": "digits"},
              "threats": {"linf": {"eps": 0.1}}, "models": [model, {**model, "width": 8}]}  # fmt: skip
    (mistake,) = mistakes_of(bounds)
    assert mistake.path == ("models", 1, "file")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "mistral"])
def test_a_folder_whose_config_fits_its_weights_is_no_mistake(family, family_folder):
    check_shapes(examine_folder(family_folder(family)))


@pytest.mark.parametrize(
    ("family", "changes", "first"),
    [
        ("llama", {"hidden_size": 64}, r"\w+\.weight: \[\d+, 32\] instead of \[\d+, 64\]"),
        ("llama", {"intermediate_size": 48}, r"mlp\.\w+_proj\.weight"),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, r"self_attn\.\w_proj\.weight"),
        ("gpt2", {"n_embd": 64}, r"transformer\.h\.0\."),
    ],
)
def test_a_config_that_contradicts_its_weights_is_refused_before_the_run(
    family, changes, first, family_folder, tmp_path
):
    folder = Path(shutil.copytree(family_folder(family), tmp_path / family))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=rf"weights are not of the shape that config\.json gives them, first .*{first}"):
        check_shapes(examine_folder(folder))
    values = {"kind": "calibrate.measure", "name": "measured", "model": {"folder": str(folder)}}
    (mistake,) = mistakes_of({**values, "questions": {"name": "world"}, "sampler": {"backend": "transformers"}})
    assert mistake.path == ("model", "folder")


def test_an_unusual_architecture_is_not_taken_for_a_contradiction(tmp_path):
    """The word embedding of an OPT may be narrower than its layers: what config.json says explains that."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    OPTForCausalLM(OPTConfig(vocab_size=9, word_embed_proj_dim=16, **sizes)).save_pretrained(tmp_path / "opt")
    check_shapes(examine_folder(tmp_path / "opt", tokenizer=False))
