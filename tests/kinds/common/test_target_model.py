"""Where the model of an evaluation comes from: what does not fit is refused, and it is said what to change."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from poise.data.images.spec import DataSpec
from poise.errors import UserError
from poise.kinds import KINDS
from poise.kinds.common.target_model import TargetModel, open_target_model
from poise.kinds.common.target_model_spec import TargetModelSpec
from poise.kinds.robust_evaluate.spec import RobustEvaluateSpec
from poise.models.build import build
from poise.models.spec import ModelSpec
from poise.spec import SpecError, load

pytestmark = pytest.mark.usefixtures("allow_code")

LINF, L2 = {"norm": "linf", "eps": "1/20"}, {"norm": "l2", "eps": 0.5}
ATTACKS = [{"attack": "fgsm", "threat": LINF}, {"attack": "pgd", "threat": L2}]


def opened(**model: object) -> TargetModel:
    data = DataSpec(name="digits", limit=300)
    return open_target_model(TargetModelSpec.model_validate(model), data, store="", seed=0, device=torch.device("cpu"))


def refused(message: str, **model: object) -> None:
    with pytest.raises(UserError, match=message):
        opened(**model)


def exported(folder: Path, change=lambda tensors: tensors) -> str:
    model = build(ModelSpec(width=4), shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.4,), seed=3)
    plain = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(change(plain), folder / "model.safetensors")
    return str(folder / "model.safetensors")


def test_a_state_dict_is_the_whole_of_a_model(tmp_path):
    """Its own normalisation too, not that of the data it is tried on."""
    target = opened(file=exported(tmp_path), width=4)
    known = build(ModelSpec(width=4), shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.4,), seed=3).eval()
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(target.model(x), known(x))
    assert (target.weights, target.num_classes) == ("file", 10)


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        (
            lambda state: {name: value for name, value in state.items() if "normalize" not in name},
            {},
            r"2 missing \(normalize.mean, normalize.std\); the file has no normalisation inside .* to none",
        ),
        (lambda state: state, {"normalize": "none"}, "2 unknown .* has a normalisation inside: set .* to data"),
        (lambda state: {**state, "extra": torch.ones(1)}, {}, r"1 unknown \(extra\); the file has a normalisation"),
        (lambda state: state, {"width": 8}, "of another shape .*, not "),
    ],
)
def test_a_state_dict_that_does_not_fit_says_what_differs(tmp_path, change, model, message):
    refused(message, **{"file": exported(tmp_path, change), "width": 4, **model})


@pytest.mark.parametrize(
    ("path", "message"),
    [("gone.safetensors", "there is no"), ("model.pt", "pickles are never read"), ("bad.safetensors", "is damaged")],
)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, path, message):
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    refused(message, file=str(tmp_path / path))


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "wrapped.safetensors")
    return str(folder / "wrapped.safetensors")


def test_names_that_wrappers_have_added_to_are_freed_of_them(tmp_path):
    """Each as torch itself writes it; and it is said."""
    known = build(ModelSpec(width=4), shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.4,), seed=3).eval()
    x = torch.rand(5, 1, 8, 8)
    parallel = torch.nn.DataParallel(known).state_dict()
    compiled = torch.compile(known).state_dict()
    both = torch.nn.DataParallel(torch.compile(known)).state_dict()
    averaged = torch.optim.swa_utils.AveragedModel(known).state_dict()
    inside = {name.replace("body.", "body._orig_mod.", 1): value for name, value in known.state_dict().items()}
    for tensors, wrappers in (
        (parallel, ["module. (of torch.nn.DataParallel)"]),
        (compiled, ["_orig_mod. (of torch.compile)"]),
        (both, ["_orig_mod. (of torch.compile)", "module. (of torch.nn.DataParallel)"]),
        (averaged, ["module. (of torch.nn.DataParallel)"]),
        (inside, ["_orig_mod. (of torch.compile)"]),
    ):
        target = opened(file=saved(tmp_path, tensors), width=4)
        assert torch.equal(target.model(x), known(x))
        assert target.note is not None
        assert all(wrapper in target.note for wrapper in wrappers)
    assert opened(file=exported(tmp_path), width=4).note is None


FUNCTIONS = """\
import torch
from torch import nn

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def flat():
    return nn.Flatten(0)

def wide():
    return nn.Linear(5, 10)

def number():
    return 3

def failing():
    raise RuntimeError("no weights here")

def misspelt():
    return nm.Linear(5, 10)

def wrapped(width=3, depth=1):
    inner = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(depth - 1)), nn.Linear(64, width))
    return nn.ModuleDict({"module": inner})["module"] if depth < 3 else Outer(inner)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.module = inner

    def forward(self, x):
        return self.module(x)


constant = 3


class Buggy(nn.Sequential):
    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return self.haed(x)


class Torn(nn.Flatten):
    def forward(self, x):
        return x.view(3, 5)


class Leaving(nn.Flatten):
    def forward(self, x):
        return torch.from_numpy(x.flatten(1).numpy())
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"functions_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "returned a int, not an nn.Module"),
        ("failing", "RuntimeError: no weights here"),
        ("absent", "defines no 'absent'; valid: "),
        ("constant", "not callable"),
        ("few", "tells 3 classes apart and the data set has 10"),
        ("flat", r"gives torch.float32 \(128,\) for 2 images"),
        ("wide", r"does not take images \(1, 8, 8\)"),
        ("misspelt", r"NameError: name 'nm' is not defined \(functions_\d+\.py:20\)"),
        ("Buggy", r"the model fails on images \(1, 8, 8\): AttributeError: 'Buggy' .* 'haed' \(functions_\d+\.py:44\)"),
        ("Torn", r"does not take images \(1, 8, 8\): RuntimeError: .* \(functions_\d+\.py:49\)"),
        ("Leaving", r"fails on images \(1, 8, 8\) that need a gradient: RuntimeError: .* \(functions_\d+\.py:54\)"),
    ],
)
def test_a_function_that_will_not_do_is_refused(functions, name, message):
    refused(message, function=f"{functions}:{name}")


def test_a_function_takes_arguments_and_the_weights_of_a_file(functions, tmp_path):
    weights = {"1.weight": torch.rand(64, 64), "1.bias": torch.rand(64), "2.weight": torch.rand(10, 64)}
    weights["2.bias"] = torch.rand(10)
    x = torch.rand(4, 1, 8, 8)
    logits = (x.flatten(1) @ weights["1.weight"].T + weights["1.bias"]) @ weights["2.weight"].T + weights["2.bias"]
    made = {"function": f"{functions}:wrapped", "arguments": {"width": 10, "depth": 2}}
    target = opened(**made, file=saved(tmp_path, weights))
    torch.testing.assert_close(target.model(x), logits)
    assert target.weights == "function"
    file = saved(tmp_path, {f"module.{name}": value for name, value in weights.items()})
    torch.testing.assert_close(opened(**made, file=file).model(x), logits)
    refused("is not the state dict of what .*:wrapped returns: .* missing", **made, file=exported(tmp_path))
    refused("unexpected keyword argument 'breadth'", function=made["function"], arguments={"breadth": 3})


def test_a_model_whose_own_names_begin_so_keeps_them(functions, tmp_path):
    made = {"function": f"{functions}:wrapped", "arguments": {"width": 10, "depth": 3}}
    own = opened(**made).model.state_dict()
    assert all(name.startswith("module.") for name in own)
    target = opened(**made, file=saved(tmp_path, own))
    assert target.note is None
    assert all(torch.equal(value, own[name]) for name, value in target.model.state_dict().items())


def test_only_the_images_that_are_attacked_are_decoded(tmp_path):
    """Training images that cannot be decoded do not matter to a test of the test split."""
    images = torch.randint(0, 256, (30, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    encoded = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        encoded.append(file.getvalue())
    labels = [number // 3 for number in range(30)]  # sorted by class
    pq.write_table(pa.table({"image": encoded, "label": labels}), tmp_path / "test.parquet")
    pq.write_table(pa.table({"image": [b"torn"] * 30, "label": labels}), tmp_path / "train.parquet")
    model = TargetModelSpec(file=exported(tmp_path), width=4)
    data = DataSpec(name="images", root=str(tmp_path))
    target = open_target_model(model, data, store="", seed=0, device=torch.device("cpu"))
    assert torch.equal(target.images.images[:, 0], torch.from_numpy(images))
    assert target.choose(10).labels.tolist() == list(range(10))
    assert target.choose(20).labels.bincount().tolist() == [2] * 10
    with pytest.raises(UserError, match=r"train\.parquet cannot be read"):
        open_target_model(model, data, store="", seed=0, device=torch.device("cpu"), split="validation")


def test_a_module_that_is_not_there_is_named():
    refused("no_such_module", function="no_such_module:f")


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"model": None}, "model", "run: RUN, file: FILE or function"),
        ({"model": {}}, "model", "one of run"),
        ({"model": {"run": "a", "file": "b"}}, "model", "one of run"),
        ({"model": {"run": "a", "width": 3}}, "width", "that of a run is known"),
        ({"model": {"function": "a.b"}}, "function", "not of the form"),
        ({"model": {"function": "a:b", "checkpoint": "best"}}, "checkpoint", "only a run"),
        ({"model": {"file": "a"}}, "data", "is required"),
        ({"model": {"file": "a", "arguments": {"b": 1}}}, "arguments", "only a function takes arguments"),
        ({"model": {"run": "a", "function": "a:b"}}, "model", "one of run"),
        ({"model": {"file": "a", "function": "a:b", "width": 3}}, "width", "that of a function is known"),
        ({"attacks": []}, "attacks", "at least one"),
        ({"attacks": [ATTACKS[0], ATTACKS[0]]}, "attacks.1", "fgsm-linf is taken"),
        ({"attacks": [{**ATTACKS[0], "name": "clean"}]}, "attacks.0", "clean is taken"),
        ({"attacks": [{**ATTACKS[1], "sparsity": 3}]}, "sparsity", "l1 alone"),
        ({"attacks": [{"attack": "apgd", "threat": L2, "targets": 3}]}, "targets", "has no targets"),
        ({"recheck": {"run": "a"}}, "model", "a has chosen that"),
        ({"attacks": [{"attack": "fgsm", "threat": {"norm": "linf", "eps": 8}}]}, "eps", "eps 8 is more than"),
        (
            {"attacks": [{"attack": "pgd", "threat": LINF, "step_size": 2}]},
            "step_size",
            "step_size 2 is more than the linf distance of any two images",
        ),
        ({"attacks": [{"attack": "msd", "threats": {"linf": 8, "l2": 1}}]}, "threats.linf", "grey levels is 8/255"),
        (
            {"data": {"name": "digits"}, "attacks": [{"attack": "pgd", "threat": {"norm": "l2", "eps": 128}}]},
            "attacks.0",
            "eps 128 is more than the l2 distance of any two images, 8",
        ),
        ({"attacks": [{"attack": "autoattack", "threats": {"l2": 1}, "draws": 5}]}, "draws", "makes one draw"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes, path, message):
    values = {"kind": "robust.evaluate", "name": "bad", "model": {"run": "a"}, "attacks": ATTACKS}
    with pytest.raises(ValidationError) as caught:
        RobustEvaluateSpec.model_validate({**values, **changes})
    (problem,) = caught.value.errors()
    assert message in problem["msg"]
    place = (problem["loc"] or ("model",))[-1]
    assert problem.get("ctx", {}).get("path", place) == path


def test_a_name_that_is_taken_is_found_where_it_was_written(tmp_path):
    text = "kind: robust.evaluate\nname: twice\nmodel: {run: a}\nattacks:\n"
    stage = "- {attack: fgsm, threat: {norm: l2, eps: 1}}\n"
    (tmp_path / "spec.yaml").write_text(text + 2 * stage + "- {attack: fgms, threat: {norm: l2, eps: 1}}\n")
    with pytest.raises(SpecError) as caught:
        load(tmp_path / "spec.yaml", KINDS)
    assert [(problem.line, problem.path) for problem in caught.value.problems] == [(7, ("attacks", 2))]
    assert "did you mean 'fgsm'" in str(caught.value)
    (tmp_path / "spec.yaml").write_text(text + 2 * stage)
    with pytest.raises(SpecError, match="fgsm-l2 is taken") as caught:
        load(tmp_path / "spec.yaml", KINDS)
    assert [problem.line for problem in caught.value.problems] == [6]
