"""A report on two small trained networks: its numbers are those of the checkpoints, and it reads as a page."""

from __future__ import annotations

import io
import json
import math
import sys
import warnings

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import save_file

from poise import kinds
from poise.bounds.operators import operator_norms
from poise.engine.lifecycle import claim
from poise.errors import UserError
from poise.kinds import report_sections, result_classes
from poise.kinds.bounds_report.result import BoundsReportResult
from poise.kinds.bounds_report.spec import BoundsReportSpec
from poise.kinds.common.trained_classifier import open_trained
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.kinds.sweep.result import SweepResult, TrialResult
from poise.report.page import render
from poise.report.record import load_record
from poise.report.table import comparison
from poise.spec import RunSpec
from poise.store.result import write_result
from poise.store.runs import Run, open_run
from poise.train.context import Context

pytestmark = pytest.mark.usefixtures("allow_code")


def finish(run: Run, spec: RunSpec) -> None:
    with claim(run, spec):
        kinds.run(spec, Context(run))


def train(store: str, name: str, **changes: object) -> None:
    few = {"every": {"epochs": 4}}
    values = {
        "kind": "robust.train",
        "name": name,
        "store": store,
        "model": {"name": "cnn", "width": 4},
        "data": {"name": "digits", "batch_size": 50, "limit": 300, "validation": 50},
        "threats": {"linf": {"eps": 0.05, "steps": 2}},
        "objective": {"name": "at"},
        "train": {
            "epochs": 8,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluate_every": {"epochs": 4},
            "checkpoint": few,
        },
        "evaluate": {"threats": {"linf": {"eps": 0.02, "steps": 2}, "l1": {"eps": 1, "steps": 2}}, "num_examples": 80},
    }
    run = open_run(store, name)
    finish(run, RobustTrainSpec.model_validate({**values, **changes}))


def report(store: str, name: str, runs: list[str], **changes: object) -> Run:
    values = {"kind": "bounds.report", "name": name, "store": store, "runs": runs, "num_examples": 60, "percentile": 50}
    run = open_run(store, name)
    finish(run, BoundsReportSpec.model_validate({**values, **changes}))
    return run


def in_terminal(run: Run) -> str:
    """What the tables of one run show at 200 columns, line breaks taken as spaces."""
    console = Console(file=io.StringIO(), width=400)
    for table in comparison([load_record(run, result_classes())], report_sections()):
        console.print(table)
    return " ".join(console.file.getvalue().split())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("runs"))
    train(folder, "weak")
    train(folder, "strong", objective={"name": "avg"}, threats={"linf": {"eps": 0.1, "steps": 2}, "l2": {"eps": 0.5}})
    sweep = open_run(folder, "both")
    sweep.claim_spec("kind: sweep\n", "0")
    sweep.start("sweep", "0")
    write_result(sweep, sweep_result({"weak": "finished", "gone": "failed"}))
    sweep.finish("finished")
    return folder


def sweep_result(trials: dict[str, str]) -> SweepResult:
    """The result of a sweep "both" with trials of these names and ends."""
    return SweepResult(
        run="both",
        seed=0,
        metric="clean",
        mode="max",
        judgement={},
        judged_by="clean",
        judged_on="validation",
        best=next(iter(trials)),
        failed=[name for name, status in trials.items() if status == "failed"],
        trials=[
            TrialResult(run=name, status=status, values={}, metric=None, step=None, test={})
            for name, status in trials.items()
        ],
        parts=list(trials),
    )


@pytest.fixture(scope="module")
def finished(store: str) -> Run:
    return report(store, "report", ["weak", "strong"])


def test_the_norms_are_those_of_the_selected_checkpoint(store, finished):
    weak, _ = json.loads(finished.read("artifacts/bounds.json"))["networks"]
    trained = open_trained(store, "weak", torch.device("cpu"))
    layers = operator_norms(trained.model, (1, 8, 8))
    told = json.loads(open_run(store, "weak").read("result.json"))
    assert (weak["step"], weak["selected"]) == (told["best_step"], "best")
    assert [layer["sigma_hi"] for layer in weak["layers"]] == [layer.sigma_hi for layer in layers]
    product = math.prod(layer.sigma_hi for layer in layers) / min(trained.data.std)
    assert weak["log10"]["spectral_product"] == pytest.approx(math.log10(product))
    assert (weak["samples"], weak["depth"]) == (250, 4)


def test_test_accuracy_and_gaps_are_of_one_attack(store, finished):
    """The test side of the report is what the run itself has measured, on the same first examples."""
    networks = json.loads(finished.read("result.json"))["networks"]
    for network in networks:
        assert set(network["accuracy"]["test"]) == {
            "clean",
            "robust/linf",
            "robust/l1",
            "robust/average",
            "robust/union",
        }
        for measure, gap in network["gap"].items():
            assert gap == network["accuracy"]["train"][measure] - network["accuracy"]["test"][measure]
    again = report(store, "again", ["weak"], num_examples=80, seed=0)
    told = json.loads(open_run(store, "weak").read("result.json"))["accuracy"]["best"]
    assert json.loads(again.read("result.json"))["networks"][0]["accuracy"]["test"] == told


def test_bounds_hold_together(finished):
    for network in json.loads(finished.read("result.json"))["networks"]:
        clean, robust = network["bounds"]["clean"], network["bounds"]["robust"]
        assert 0 < network["margin"]["used"] <= network["margin"]["percentile"]
        right = network["accuracy"]["train"]["clean"]  # the margin is the median of these
        assert network["margin"]["below"] <= 1 - right / 2 + 0.01
        assert network["radius"]["clean"] < network["radius"]["robust"]
        for name in ("arc", "arc_frobenius", "covering", "pac_bayes", "pac_bayes_shape"):
            assert clean[name] <= robust[name]
        assert robust["arc"] <= robust["arc_frobenius"]
        assert robust["vacuous"] == min(robust["arc"], robust["pac_bayes"]) > max(network["gap"].values())
        parts = network["decomposition"]
        ratio = network["radius"]["robust"] / network["radius"]["clean"]
        assert parts["adversary"] == pytest.approx(math.log10(ratio))
        arc = math.log10(4 * 24 / network["margin"]["used"] * network["radius"]["robust"] / math.sqrt(250))
        arc += network["log10"]["spectral_product"] + math.log10(network["parameters"] * math.log(12)) / 2
        assert robust["arc"] == pytest.approx(arc, abs=1e-3)


def test_no_adversary_makes_the_robust_bounds_the_clean_ones(store):
    run = report(store, "none", ["weak"], threats={"l2": {"eps": 0, "steps": 1}})
    (network,) = json.loads(run.read("result.json"))["networks"]
    assert network["bounds"]["robust"] == network["bounds"]["clean"]
    assert network["decomposition"]["adversary"] == 0


def test_a_margin_that_is_not_positive_leaves_the_bounds_undefined(store):
    run = report(store, "low", ["weak"], percentile="1/10", margins="all")
    (network,) = json.loads(run.read("result.json"))["networks"]
    assert network["margin"] is None
    assert network["bounds"] == {}
    assert "undefined" in render([load_record(run, result_classes())], "low", report_sections())
    assert "set margins: correct" in in_terminal(run)


def test_a_network_with_training_errors_has_bounds_at_the_margins_of_what_it_gets_right(store):
    """The spec's own percentile; 'weak' misclassifies more of its training images than that."""
    run = report(store, "usual", ["weak"], percentile="5")
    (network,) = json.loads(run.read("result.json"))["networks"]
    errors = 1 - network["accuracy"]["train"]["clean"]
    assert 0.05 < errors < network["margin"]["below"]
    assert network["bounds"]["robust"]["arc"] > 0
    of_all = report(store, "of-all", ["weak"], percentile="5", margins="all")
    assert "misclassified" in in_terminal(of_all)


def test_a_sweep_stands_for_its_trials_and_what_is_left_out_is_said(store):
    run = report(store, "of-a-sweep", ["both", "weak"])
    networks = json.loads(run.read("result.json"))["networks"]
    assert [network["run"] for network in networks] == ["weak"]
    (left,) = [event["runs"] for event in run.events() if event["event"] == "left_out"]
    assert left == ["gone"]


def test_a_network_that_is_smooth_has_no_pac_bayes_bound(store):
    train(store, "smooth", model={"name": "cnn", "width": 4, "activation": "silu"})
    (network,) = json.loads(report(store, "of-smooth", ["smooth"]).read("result.json"))["networks"]
    assert network["bounds"]["robust"]["pac_bayes"] is None
    assert network["bounds"]["robust"]["vacuous"] == network["bounds"]["robust"]["arc"]


def test_a_network_with_softplus_has_no_covering_bound(store):
    train(store, "softplus", model={"name": "cnn", "width": 4, "activation": "softplus"})
    run = report(store, "of-softplus", ["softplus"])
    (network,) = json.loads(run.read("result.json"))["networks"]
    assert set(network["bounds"]["robust"].values()) == {None}
    assert "no ARC and no cover" in in_terminal(run)


def test_models_from_elsewhere_have_bounds(store, tmp_path, monkeypatch):
    """The state dict of a run and a function of the user's own have the bounds of the run that they came from."""
    trained = open_trained(store, "weak", torch.device("cpu"))
    weights = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    save_file(weights, tmp_path / "weak.safetensors")
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Shifted(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        return self.fc((2 * x - 1).view(x.size(0), -1))\n"
        "make = Shifted\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    changes = {
        "models": [
            {"file": "weak.safetensors", "name": "cnn", "width": 4, "normalize": "data"},
            {"function": "mine:make"},
        ],
        "data": {"name": "digits", "batch_size": 50, "limit": 300, "validation": 50},
        "threats": {"linf": {"eps": 0.02, "steps": 2}},
    }
    run = report(store, "elsewhere", ["weak"], **changes)
    of_run, of_file, of_function = json.loads(run.read("result.json"))["networks"]
    for key in ("log10", "margin"):
        assert of_file[key] == pytest.approx(of_run[key])
    for risk, bounds in of_run["bounds"].items():
        assert of_file["bounds"][risk] == pytest.approx(bounds)
    assert (of_file["run"], of_file["step"]) == ("weak.safetensors", None)
    assert of_function["depth"] == 1
    assert "mine:make" in in_terminal(run)


def test_models_that_share_a_file_are_told_apart_by_their_labels(store, tmp_path, monkeypatch):
    """A function, two functions with one file of weights, and that file as weights of one of them once more."""
    (tmp_path / "shared.py").write_text(
        "import torch\n"
        "def plain():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "def other(scale=1):\n"
        "    return plain()\n"
    )
    monkeypatch.chdir(tmp_path)
    save_file({"1.weight": torch.ones(10, 64), "1.bias": torch.zeros(10)}, "w.safetensors")
    plain, other = ({"function": f"shared:{name}", "file": "w.safetensors"} for name in ("plain", "other"))
    data, threats = {"name": "digits"}, {"linf": {"eps": 0.02, "steps": 1}}
    models = [{"function": "shared:plain"}, plain, other, {**other, "arguments": {"scale": 2}}]
    run = report(store, "shared", [], models=models, data=data, threats=threats, num_examples=20)
    assert [network["run"] for network in json.loads(run.read("result.json"))["networks"]] == [
        "shared:plain",
        "shared:plain with w.safetensors",
        "shared:other with w.safetensors (models[2])",
        "shared:other with w.safetensors (models[3])",
    ]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"runs": []}, "runs: is required"),
        ({"models": [{"run": "weak"}]}, r"models.0.run: name it under runs instead: runs: \[weak\]"),
        ({"models": [{"function": "a:b"}], "threats": {"linf": {"eps": 0.1}}}, "data: is required"),
        ({"models": [{"function": "a:b"}], "data": {"name": "digits"}}, "threats: is required"),
        ({"data": {"name": "digits"}}, "data: belongs to models"),
    ],
)
def test_what_a_report_lacks_is_said_before_it_starts(changes, what):
    values = {"kind": "bounds.report", "name": "short", "runs": ["weak"]}
    with pytest.raises(ValidationError, match=what.partition(": ")[2]):
        BoundsReportSpec.model_validate({**values, **changes})


@pytest.mark.parametrize(
    ("names", "what"),
    [(["report"], "bounds.report"), (["waek"], "is it 'weak'"), (["started"], "no result yet")],
)
def test_runs_that_cannot_be_reported_on_are_refused(store, finished, names, what):
    open_run(store, "started").claim_spec("kind: robust.train\n", "0")
    with pytest.raises(UserError, match=what):
        report(store, f"bad-{names[0]}", names)


def test_it_is_shown_on_a_page_and_in_a_terminal(finished):
    record = load_record(finished, result_classes())
    page = render([record], "report", report_sections())
    assert page.count("<svg") == 1
    assert "Spectral norms" in page
    assert "mathdefault" not in page
    assert isinstance(record.result, BoundsReportResult)
    assert len(record.result.networks) == 2
    for network in record.result.networks:
        assert f"10^{network.bounds['robust']['vacuous']:.1f}" in page
    terminal = in_terminal(finished)
    assert "strong" in terminal
    assert record.result.bounds == {"arc": "ARC", "pac_bayes": "PAC-Bayes", "covering": "cover"}
    for name, label in record.result.bounds.items():
        assert label in terminal
        assert all(f" {network.bounds['robust'][name]:.1f} " in terminal for network in record.result.networks)


ZEROS = """\
from torch import nn

def zeros(layers):
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(layers - 1)), nn.Linear(64, 10))
    nn.init.zeros_(model[1].weight)
    return model
"""


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.filterwarnings("ignore::UserWarning")  # an attack has no gradient here, which the run records
def test_a_layer_of_zeros_is_drawn_without_a_warning(tmp_path, monkeypatch, layers):
    """Its norm has no logarithm."""
    (tmp_path / "zeros_of_mine.py").write_text(ZEROS)
    monkeypatch.delitem(sys.modules, "zeros_of_mine", raising=False)
    monkeypatch.chdir(tmp_path)
    spec = BoundsReportSpec(
        kind="bounds.report",
        name="zeros",
        store=str(tmp_path / "runs"),
        models=[{"function": "zeros_of_mine:zeros", "arguments": {"layers": layers}}],
        data={"name": "digits", "limit": 100},
        threats={"linf": {"eps": "1/20", "steps": 2}},
        num_examples=20,
    )
    run = open_run(spec.store, spec.name)
    finish(run, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = render([load_record(run, result_classes())], "report", report_sections())
    assert ("Spectral norms" in page) == (layers > 1)


BROKEN = """\
import torch
from torch import nn

class Buggy(nn.Linear):
    def forward(self, x):
        return self.haed(x)

class Traced(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)) + (1 if type(x) is torch.Tensor else x.nonsense.shape[0][1:] + {}["key"])

class Single(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)) + x.flatten(1) @ torch.zeros(64, 10)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Buggy", r"broken:Buggy: the model fails on images \(1, 8, 8\): AttributeError: .*'haed' \(broken.py:6\)"),
        ("Traced", r"broken:Traced: the network cannot be traced: KeyError: 'key' \(broken.py:10\)"),
        ("Single", r"broken:Single: the network cannot be run in float64: RuntimeError: .*dtype"),
    ],
)
def test_an_error_in_the_code_of_a_model_is_told_in_one_line(store, tmp_path, monkeypatch, capfd, name, message):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    monkeypatch.chdir(tmp_path)
    model = {"function": f"broken:{name}", "arguments": {"in_features": 64, "out_features": 10}}
    data = {"name": "digits", "limit": 100}
    threats = {"linf": {"eps": 0.02, "steps": 1}}
    with pytest.raises(UserError, match=message):
        report(store, f"broken-{name}", [], models=[model], data=data, threats=threats, num_examples=20)
    assert "Traceback" not in capfd.readouterr().err
