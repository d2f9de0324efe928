"""Code of the user runs where it is allowed, and nowhere else: models, data, texts, questions and metrics."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from torch import nn

from poise.cli import cli
from poise.data.images.batches import load as load_images
from poise.data.images.spec import DataSpec
from poise.data.text.question_spec import FunctionQuestions
from poise.data.text.questions import load_questions
from poise.data.text.records import function_rows
from poise.data.text.spec import FunctionText
from poise.errors import UserError
from poise.kinds import KINDS
from poise.kinds.code import named_code
from poise.kinds.common.trained_classifier import open_trained
from poise.observe.rows import read_rows
from poise.store.inputs import read_inputs
from poise.store.runs import Run, open_run
from poise.user_code import allow_code, explain_user_frames, is_code_allowed, load_attribute

MODULE = '''\
"""Code of a user, who keeps a mark of every import."""
from pathlib import Path

import numpy as np
import torch
from torch import nn

Path("imported").touch()


def network(width=12, fails=False):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

        def forward(self, x):
            if fails and self.training:
                raise KeyError("no such layer")
            return self.module(x)

    return Network()


def frozen():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)


def images(part, count=40, root=None):
    draw = np.random.default_rng(0 if part == "train" else 1)
    return draw.random((count, 1, 8, 8)), torch.arange(count) % 4


def flat_images(part):
    return torch.rand(4, 64), torch.arange(4)


def dark_images(part):
    return np.full((4, 1, 8, 8), -1.0), np.arange(4)


def rows(count=3, field="completion"):
    for number in range(count):
        yield {"prompt": f"say {number}", field: str(number)}


def words():
    return ["one"]


def questions():
    return [{"question": f"what is {number}", "answer": [str(number), number]} for number in range(5)]


def confidence(model, x, y, scale=1):
    return scale * model(x).softmax(1).max(1).values


def scalar(model, x, y):
    return model(x).mean()


def length(model, batch):
    return batch.mask.sum(1).float()
'''

TRAIN: dict[str, Any] = {
    "kind": "robust.train",
    "name": "mine",
    "model": {"function": "lab:network", "arguments": {"width": 6}},
    "data": {"name": "digits", "limit": 200, "validation": 40, "batch_size": 20},
    "threats": {"linf": {"eps": 0.05, "steps": 2}},
    "objective": {"name": "at"},
    "train": {"steps": 8, "checkpoint": {"every": {"steps": 4}}, "evaluate_every": {"steps": 4}},
    "evaluate": {"num_examples": 30},
}
JUDGE: dict[str, Any] = {
    "kind": "robust.evaluate",
    "name": "judged",
    "model": {"run": "mine"},
    "data": {"name": "digits"},
    "num_examples": 20,
    "attacks": [{"attack": "fgsm", "threat": {"norm": "linf", "eps": 0.05}}],
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POISE_ALLOW_CODE", raising=False)
    (tmp_path / "lab.py").write_text(MODULE)
    sys.modules.pop("lab", None)
    yield
    sys.modules.pop("lab", None)


def poise(command: str, values: dict[str, Any], *options: str) -> Result:
    Path("spec.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return CliRunner().invoke(cli, [command, "spec.yaml", *options])


def run(values: dict[str, Any]) -> Run:
    result = poise("run", values, "--engine", "local", "--allow-code")
    assert result.exit_code == 0, result.exception
    return open_run("runs", values["name"])


# --- the permission


@pytest.mark.parametrize("command", [("run", "--engine", "local"), ("submit", "--address", "http://127.0.0.1:9")])
@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, "model.function: lab:network"),
        ({"model": {"width": 4}, "data": {"name": "function", "function": "lab:images"}}, "data.function: lab:images"),
        (
            {"model": {"width": 4}, "evaluate": {"extra_metrics": {"sure": {"function": "lab:confidence"}}}},
            "evaluate.extra_metrics.sure.function: lab:confidence",
        ),
    ],
)
def test_code_is_refused_in_one_line_before_anything_is_started(command, changes, place):
    result = poise(command[0], {**TRAIN, **changes}, *command[1:])
    assert isinstance(result.exception, UserError)
    line, ending = str(result.exception).splitlines()
    assert f": {place} runs code of the module lab" in line
    assert "only with --allow-code (or POISE_ALLOW_CODE=1)" in line
    assert line.startswith("spec.yaml:")
    assert ending == "1 mistake; nothing was run."
    assert not Path("runs").exists()
    assert not Path("imported").exists()


def test_a_check_without_the_permission_imports_nothing_and_says_so():
    result = poise("check", TRAIN)
    assert result.exit_code == 0, result.exception
    assert "model.function: lab:network runs code of the module lab" in result.output
    assert "known when your function has made the network" in result.output
    assert not Path("imported").exists()
    assert "runs code" not in poise("check", TRAIN, "--allow-code").output
    wrong = poise("check", {**TRAIN, "model": {"function": "lab:netwrk"}})
    assert "module 'lab' defines no 'netwrk'; did you mean 'network'?" in str(wrong.exception)


def test_the_permission_ends_with_the_command(monkeypatch):
    assert not is_code_allowed()
    poise("check", TRAIN, "--allow-code")
    assert not is_code_allowed()
    with allow_code():
        assert is_code_allowed()
        with allow_code():
            pass
        assert is_code_allowed()
    assert not is_code_allowed()
    monkeypatch.setenv("POISE_ALLOW_CODE", "0")
    assert not is_code_allowed()


def test_a_module_is_not_imported_without_the_permission():
    with pytest.raises(UserError, match=r"model.function: lab:network runs code of the module lab"):
        load_attribute("lab:network", "model.function")
    assert not Path("imported").exists()
    with allow_code():
        assert load_attribute("lab:network", "model.function")().module
        assert Path("imported").exists()
        with pytest.raises(UserError, match=r"model\.function: module 'lab' defines no 'nothing'"):
            load_attribute("lab:nothing", "model.function")


# --- a model in training


def test_a_network_of_the_users_code_is_trained_measured_and_opened_again():
    done = run(TRAIN)
    result = json.loads(done.read("result.json"))
    assert result["parameters"] == 64 * 6 + 6 + 6 * 10 + 10
    assert {record.file for record in read_inputs(done).values()} == {"lab.py"}
    with allow_code():
        trained = open_trained("runs", "mine", torch.device("cpu"))
    assert set(trained.model.state_dict()) == {
        f"module.{layer}.{kind}" for layer in (1, 3) for kind in ("weight", "bias")
    }

    # Judging it runs the code again, so the permission is needed, and what was judged is what was trained.
    refused = poise("run", JUDGE, "--engine", "local")
    assert "model.run: run 'mine' needs it: lab:network runs code of the module lab" in str(refused.exception)
    judged = json.loads(run(JUDGE).read("result.json"))
    with torch.no_grad():
        shown = trained.data.test.choose(20)
        right = trained.model(shown.images).argmax(1) == shown.labels
    (accuracy,) = judged["accuracy"].values()
    assert accuracy["clean"] == pytest.approx(right.float().mean().item())

    # The weights do not fit code that was changed since, even if the shapes do.
    Path("lab.py").write_text(MODULE.replace("nn.ReLU()", "nn.Tanh()"))
    sys.modules.pop("lab")
    changed = poise("run", {**JUDGE, "name": "again"}, "--engine", "local", "--allow-code")
    assert "model.function: lab.py has changed" in str(changed.exception)
    assert "model.function: lab.py has changed" in str(
        poise("run", TRAIN, "--engine", "local", "--allow-code").exception
    )


def test_its_first_weights_depend_on_the_seed_alone():
    from poise.kinds.common.trained_classifier import classifier

    def weights(seed: int) -> torch.Tensor:
        spec = KINDS["robust.train"].model_validate({**TRAIN, "seed": seed})
        torch.manual_seed(time.monotonic_ns())
        before = torch.get_rng_state()
        model = classifier(spec, load_images(spec.data, spec.seed))
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training
        return nn.utils.parameters_to_vector(model.parameters())

    with allow_code():
        assert torch.equal(weights(3), weights(3))
        assert not torch.equal(weights(3), weights(4))


def test_averages_weight_perturbation_and_other_objectives_take_it_too():
    values = {**TRAIN, "name": "all", "objective": {"name": "trades"}, "awp": {"gamma": 0.01}}
    result = json.loads(run({**values, "averaging": {"name": "swa"}}).read("result.json"))
    assert set(result["accuracy"]) == {"best", "final", "averaged"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"function": "lab:frozen"}, "model.function: the model lab:frozen has no parameter to train"),
        ({"function": "lab:network", "arguments": {"depth": 2}}, "unexpected keyword argument 'depth'"),
        (
            {"function": "lab:network", "arguments": {"fails": True}},
            "code of yours raised KeyError: 'no such layer' (lab.py:19 in forward: raise KeyError",
        ),
    ],
)
def test_an_error_of_the_users_network_ends_the_training_with_its_line(model, message):
    result = poise("run", {**TRAIN, "model": model}, "--engine", "local", "--allow-code")
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert open_run("runs", "mine").manifest().status == "failed"


def test_an_architecture_beside_a_function_is_refused():
    values = {**TRAIN, "model": {"function": "lab:network", "width": 8}}
    assert "model.width: the architecture is written for a network of Poise only" in str(
        poise("check", values).exception
    )
    values = {**TRAIN, "model": {"arguments": {"width": 8}}}
    assert "model.arguments: only a function takes arguments" in str(poise("check", values).exception)


def test_errors_of_communication_are_left_to_the_engine(tmp_path):
    folder = tmp_path / "torch" / "distributed"
    folder.mkdir(parents=True)
    (folder / "c10d.py").write_text("def all_reduce():\n    raise RuntimeError('connection closed by peer')\n")
    sys.path.insert(0, str(folder))
    try:
        from c10d import all_reduce

        with pytest.raises(RuntimeError, match="closed by peer"), explain_user_frames():
            all_reduce()
    finally:
        sys.path.remove(str(folder))
    with (
        pytest.raises(UserError, match=r"code of yours raised ValueError: mine \(.*test_user_code.py"),
        explain_user_frames(),
    ):
        raise ValueError("mine")


# --- data sets


def test_images_of_the_users_code():
    spec = DataSpec.model_validate({"name": "function", "function": "lab:images", "arguments": {"count": 30}})
    with allow_code():
        data = load_images(spec, seed=0)
    assert (len(data.train) + len(data.validation), len(data.test), data.classes, data.shape) == (30, 30, 4, (1, 8, 8))
    assert data.train.images.dtype == torch.float32
    with pytest.raises(UserError, match=r"data\.function: lab:images runs code"):
        load_images(spec, seed=0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("flat_images", r"returned images of shape \(4, 64\), not \(N, channels, height, width\)"),
        ("dark_images", "neither uint8 nor floats from 0 to 1"),
        ("words", "data.function: lab:words: TypeError: words"),
    ],
)
def test_images_that_are_none(function, message):
    with allow_code(), pytest.raises(UserError, match=message):
        load_images(DataSpec(name="function", function=f"lab:{function}"), seed=0)


def test_the_files_that_a_function_reads_are_recorded_if_root_names_them(tmp_path):
    (tmp_path / "pixels").mkdir()
    (tmp_path / "pixels" / "a.bin").write_bytes(b"1")
    values = {**TRAIN, "data": {"name": "function", "function": "lab:images", "root": "pixels", "batch_size": 4}}
    done = run({**values, "train": {"steps": 1}})
    assert {record.file for record in read_inputs(done).values()} == {"lab.py", "a.bin"}


def test_a_text_and_questions_of_the_users_code():
    with allow_code():
        rows = function_rows("lab:rows", {"count": 2}, "data.function")
        questions = load_questions(FunctionQuestions(name="function", function="lab:questions", limit=3))
        with pytest.raises(UserError, match="row 1 of lab:words is a str, not a mapping"):
            function_rows("lab:words", {}, "data.function")
        with pytest.raises(UserError, match="lab:rows returned no row"):
            function_rows("lab:rows", {"count": 0}, "data.function")
    assert [row.values for row in rows] == [{"prompt": f"say {n}", "completion": str(n)} for n in range(2)]
    assert len(questions) == 3
    assert questions[0].id.startswith("lab:questions:")
    spec = FunctionText(name="function", function="lab:rows")
    assert [(each.where, each.kind) for each in spec.inputs()] == [("function", "code")]


# --- metrics


def test_a_metric_of_the_users_code_is_measured_and_can_judge_a_sweep():
    metrics = {"sure": {"function": "lab:confidence", "arguments": {"scale": 2}}}
    values = {**TRAIN, "name": "base", "evaluate": {"num_examples": 30, "extra_metrics": metrics}}
    sweep = {"kind": "sweep", "name": "tried", "metric": "metric/sure", "mode": "min", "base": dict(values)}
    del sweep["base"]["name"]
    done = run({**sweep, "space": {"seed": {"grid": [0, 1]}}})
    trials = json.loads(done.read("result.json"))["trials"]
    trial = open_run("runs", trials[0]["run"])
    result = json.loads(trial.read("result.json"))
    with allow_code():
        trained = open_trained("runs", trial.name, torch.device("cpu"))
    with torch.no_grad():
        sure = trained.model(trained.data.test.choose(30).images).softmax(1).max(1).values
    assert result["extra_metrics"][trained.selected]["metric/sure"] == pytest.approx(2 * sure.mean().item(), rel=1e-5)
    rows = read_rows(trial.read(name) for name in trial.files("metrics/") if name.endswith(".parquet")).to_pylist()
    measured = [row["value"] for row in rows if (row["split"], row["name"]) == ("validation", "metric/sure")]
    assert trials[0]["metric"] == pytest.approx(min(measured))


def test_a_metric_that_is_no_number_per_example_is_named():
    values = {**TRAIN, "evaluate": {"num_examples": 30, "extra_metrics": {"all": {"function": "lab:scalar"}}}}
    result = poise("run", values, "--engine", "local", "--allow-code")
    assert "evaluate.extra_metrics.all.function: lab:scalar returned a tensor () for 30 examples" in str(
        result.exception
    )


# --- what is sent to a cluster


def test_the_code_of_a_run_that_is_read_is_named_with_it():
    run(TRAIN)
    spec = KINDS["robust.evaluate"].model_validate(JUDGE)
    assert [(code.path, code.reference, code.run) for code in named_code(spec)] == [
        (("model", "run"), "lab:network", "mine")
    ]


def test_two_ranks_train_a_network_of_the_users_code(fork_server):
    Path("spec.yaml").write_text(yaml.safe_dump({**TRAIN, "name": "two"}))
    done = fork_server.run_ranks(["-m", "poise", "run", "spec.yaml", "--engine", "local", "--allow-code"])
    assert done.returncode == 0, done.stderr
    assert open_run("runs", "two").manifest().status == "finished"
