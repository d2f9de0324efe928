"""A model of the user's own that passes the first look and fails later: the run ends with its name, file and line."""

from __future__ import annotations

import hashlib
import io
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from poise import kinds
from poise.data.images.spec import DataSpec
from poise.engine.lifecycle import claim
from poise.errors import UserError
from poise.kinds.bounds_report.spec import BoundsReportSpec
from poise.kinds.common.target_model import open_target_model
from poise.kinds.common.target_model_spec import TargetModelSpec
from poise.kinds.robust_evaluate.spec import RobustEvaluateSpec
from poise.spec import RunSpec
from poise.store.runs import open_run
from poise.train.context import Context

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("allow_code")]

MODELS = """\
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.flatten(1))

class Small(Linear):
    def forward(self, x):
        if len(x) > 2:
            x = x.view(7, -1)
        return super().forward(x)

class Alone(Linear):
    def forward(self, x):
        if len(x) == 1:
            raise RuntimeError("not for one image")
        return super().forward(x)

class Counting(Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) if self.calls < 12 else self.answer[self.calls]

class Shifting(Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)[:, : 10 if self.calls < 12 else 7]

class Missing(Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) if self.calls < 12 else None

class Graphics(Linear):
    def forward(self, x):
        if len(x) > 2:
            x = x.cuda()
        return super().forward(x)

class InPlace(Linear):
    def forward(self, x):
        h = super().forward(x).exp()
        if x.requires_grad:
            h.add_(1)
        return h

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no time for that")

class OneWay(Linear):
    def forward(self, x):
        return Doubled.apply(super().forward(x))

class Stubborn(Linear):
    def train(self, mode=True):
        raise RuntimeError("always training")

class Extra(Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass

class Scripted(nn.Module):
    def forward(self, x):
        if x.shape[0] > 2:
            x = x.view(7, -1)
        return x.flatten(1)[:, :10]

class Wrong(nn.Module):
    def forward(self, x):
        return x.view(7, -1)

def scripted_wrong():
    return torch.jit.script(Wrong())

def flat():
    return nn.Flatten()

def scripted():
    return torch.jit.script(Scripted())

class Large(Linear):
    def forward(self, x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)
"""


CASES = [
    (
        "Small",
        r"raised RuntimeError on a batch of shape \(20, 1, 8, 8\): .*invalid.* in forward: x = x.view\(7, -1\)\)",
    ),
    ("Alone", r"raised RuntimeError on a batch of shape \(1, 1, 8, 8\): not for one image \(.*; .* of any size"),
    ("Counting", r"raised AttributeError on a batch of shape \(\d+, 1, 8, 8\): .*'answer' \("),
    ("Shifting", r"returned float32 \(\d+, 7\) .* for a batch of shape \(\d+, 1, 8, 8\): .* logits .*\(\d+, 10\)"),
    ("Missing", r"returned NoneType for a batch of shape .*: .* logits .*\(\d+, 10\)"),
    ("Graphics", r"raised (AssertionError|RuntimeError) on a batch of shape .* in forward: x = x.cuda\(\)\)"),
    ("InPlace", r"raised RuntimeError in the backward pass of a batch of shape .*inplace operation"),
    (
        "OneWay",
        r"raised RuntimeError in the backward pass of a batch of shape .*: no time for that \(.* in backward: raise",
    ),
    (
        "scripted",
        r"raised RuntimeError on a batch of shape \(20, 1, 8, 8\): shape '\[7, -1\]' is invalid .*:\d+ in forward\)",
    ),
    ("Large", r"raised OutOfMemoryError on a batch of shape .*out of memory .*; set a smaller batch_size"),
]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"models_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def refused(spec: RunSpec) -> str:
    """The error that ends a run, in one line."""
    run = open_run(spec.store, spec.name)
    with pytest.raises(UserError) as caught, claim(run, spec):
        kinds.run(spec, Context(run))
    message = str(caught.value)
    assert "\n" not in message
    assert run.manifest().error == message
    return message


def evaluation(tmp_path: Path, function: str, **changes: Any) -> RobustEvaluateSpec:
    pgd = {"attack": "pgd", "threat": {"norm": "linf", "eps": "1/20"}, "steps": 5}
    values = {
        "kind": "robust.evaluate",
        "name": "own",
        "store": str(tmp_path / "runs"),
        "model": {"function": function},
        "data": {"name": "digits", "limit": 300},
        "num_examples": 50,
        "batch_size": 20,
        "attacks": [pgd],
    }
    return RobustEvaluateSpec.model_validate({**values, **changes})


@pytest.mark.parametrize(("name", "message"), CASES)
def test_an_evaluation_names_the_model_the_batch_and_the_line(models, tmp_path, name, message):
    told = refused(evaluation(tmp_path, f"{models}:{name}"))
    assert re.search(f"the model {models}:{name} {message}", told), told


def test_a_torchscript_model_that_fails_on_the_first_images_is_told_in_one_line(models, tmp_path):
    told = refused(evaluation(tmp_path, f"{models}:scripted_wrong"))
    assert re.search(
        r"does not take images \(1, 8, 8\): RuntimeError: shape '\[7, -1\]' is invalid .*:\d+ in forward\)", told
    ), told


def bounds(tmp_path: Path, function: str, **changes: Any) -> BoundsReportSpec:
    values = {
        "kind": "bounds.report",
        "name": "bounds",
        "store": str(tmp_path / "runs"),
        "models": [{"function": function}],
        "data": {"name": "digits", "limit": 100},
        "threats": {"linf": {"eps": "1/20", "steps": 5}},
        "num_examples": 41,
        "batch_size": 20,
    }
    return BoundsReportSpec.model_validate({**values, **changes})


@pytest.mark.parametrize(("name", "message"), CASES)
def test_a_report_of_bounds_does_so_too(models, tmp_path, name, message):
    told = refused(bounds(tmp_path, f"{models}:{name}"))
    assert re.search(f"the model {models}:{name} {message}", told), told


def test_a_network_without_a_layer_has_no_bounds(models, tmp_path):
    assert f"{models}:flat: the network has no layer with weights" in refused(bounds(tmp_path, f"{models}:flat"))


def test_images_that_are_all_black_have_no_bounds(models, tmp_path):
    pixels = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(pixels, "PNG")
    table = pa.table({"image": [pixels.getvalue()] * 40, "label": [row % 10 for row in range(40)]})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    spec = bounds(
        tmp_path, f"{models}:Linear", data={"name": "images", "root": str(tmp_path)}, threats={"linf": {"eps": 0}}
    )
    assert "all training images are the constant that the network subtracts" in refused(spec)


@pytest.mark.parametrize(
    "attack",
    [
        {"attack": "autoattack", "threats": {"linf": "1/20"}},
        {"attack": "square", "threat": {"norm": "linf", "eps": "1/20"}, "queries": 50},
        {"attack": "pgd", "threat": {"norm": "linf", "eps": "1/20"}, "draws": 2},
    ],
)
def test_the_stage_and_the_line_are_named_in_every_attack(models, tmp_path, attack):
    told = refused(evaluation(tmp_path, f"{models}:Counting", attacks=[attack]))
    (line,) = [number for number, text in enumerate(MODELS.splitlines(), 1) if "self.answer" in text]
    where = rf"\({models}.py:{line} in forward: return super\(\)"
    assert re.search(rf"stage .*linf: the model {models}:Counting raised AttributeError .* {where}", told), told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Stubborn", r"the model .*:Stubborn .*RuntimeError: always training \(models_\d+.py:\d+\)"),
        ("Extra", r"the model .*:Extra .*_extra_state .* a dict, not a tensor"),
    ],
)
def test_a_model_that_cannot_be_prepared_is_refused(models, tmp_path, name, message):
    told = refused(evaluation(tmp_path, f"{models}:{name}"))
    assert re.search(message, told), told


def test_numbers_and_weights_are_those_of_the_bare_model(models):
    spec, data = TargetModelSpec(function=f"{models}:Linear"), DataSpec(name="digits", limit=300)
    target = open_target_model(spec, data, store="", seed=0, device=torch.device("cpu"))
    unwrap_user_model = nn.Linear(64, 10)
    torch.manual_seed(0)
    unwrap_user_model.reset_parameters()
    x = torch.rand(7, 1, 8, 8)
    assert torch.equal(target.model(x), unwrap_user_model(x.flatten(1)))
    digest = hashlib.sha256()
    for key, tensor in (("linear.bias", unwrap_user_model.bias), ("linear.weight", unwrap_user_model.weight)):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().numpy().tobytes())
    assert target.digest == digest.hexdigest()
