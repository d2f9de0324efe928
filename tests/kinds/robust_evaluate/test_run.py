"""Evaluation as a kind: what it finds is what `robust.evaluate` finds, and a kill or another rank changes no byte."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load, save, save_file
from torch import nn

from poise import kinds
from poise.data.images.datasets import to_float
from poise.engine.lifecycle import claim
from poise.errors import IntegrityError, PoiseError, UserError
from poise.kinds import report_sections, result_classes
from poise.kinds.common.attack_spec import AUTOATTACK
from poise.kinds.common.attack_stages import bind
from poise.kinds.common.trained_classifier import open_trained
from poise.kinds.robust_evaluate.report import falling
from poise.kinds.robust_evaluate.result import RobustEvaluateResult
from poise.kinds.robust_evaluate.spec import RobustEvaluateSpec
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.report.page import render
from poise.report.record import load_record
from poise.report.table import comparison
from poise.robust.attacks import pgd
from poise.robust.attacks.autoattack import stages as standard
from poise.robust.evaluate import evaluate
from poise.robust.noise import Noise
from poise.robust.threats import Threat
from poise.spec import RunSpec, dump
from poise.spec.seeds import derive_seed
from poise.stats import wilson
from poise.store.runs import Run, open_run
from poise.train.context import Context

pytestmark = pytest.mark.usefixtures("allow_code")

LINF, L2 = {"norm": "linf", "eps": "1/20"}, {"norm": "l2", "eps": 0.5}
ATTACKS = [
    {"attack": "fgsm", "threat": LINF},
    {"attack": "pgd", "threat": L2, "steps": 3},
    {"attack": "pgd", "threat": LINF, "steps": 5, "restarts": 2, "loss": "cw"},
]
DIGITS = {"name": "digits", "limit": 300}


def finish(spec: RunSpec) -> Run:
    run = open_run(spec.store, spec.name)
    with claim(run, spec):
        kinds.run(spec, Context(run))
    return run


def spec_of(store: str, name: str, **changes: object) -> RobustEvaluateSpec:
    values = {
        "kind": "robust.evaluate", "name": name, "store": store, "model": {"run": "small"}, "num_examples": 90,
        "batch_size": 20, "attacks": ATTACKS,
    }  # fmt: skip
    return RobustEvaluateSpec.model_validate({**values, **changes})


def attacked(store: str, name: str, **changes: object) -> Run:
    return finish(spec_of(store, name, **changes))


def refused(store: str, message: str, **changes: object) -> None:
    with pytest.raises(UserError, match=message):
        attacked(store, f"refused-{time.monotonic_ns()}", **changes)


def told(run: Run) -> dict[str, object]:
    return json.loads(run.read("result.json"))


def matrix(run: Run) -> dict[str, list[bool | None]]:
    return pq.read_table(io.BytesIO(run.read("artifacts/evaluation.parquet"))).to_pydict()


def results(run: Run) -> dict[str, bytes]:
    """The result and every artifact, by path."""
    return {name: run.read(name) for name in [*run.files("artifacts/"), *run.files("result.json")]}


def result(run: Run) -> dict[str, bytes]:
    """All that must not depend on how the run came to its end."""
    summary = run.read("result.json").replace(f'"{run.name}"'.encode(), b"")
    return {name: run.read(name) for name in ("artifacts/evaluation.parquet", "metrics/test.parquet")} | {"": summary}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("runs"))
    values = {
        "kind": "robust.train", "name": "small", "store": folder, "model": {"name": "cnn", "width": 4},
        "data": {"name": "digits", "batch_size": 50, "limit": 600, "validation": 50},
        "threats": {"linf": {"eps": 0.05, "steps": 1}}, "objective": {"name": "at"},
        "train": {"epochs": 4, "optimizer": {"name": "sgd", "lr": 0.1}}, "evaluate": {"num_examples": 60},
        "averaging": {"name": "ema", "decay": 0.5},
    }  # fmt: skip
    finish(RobustTrainSpec.model_validate(values))
    return folder


@pytest.fixture(scope="module")
def finished(store: str) -> Run:
    return attacked(store, "whole", keep_adversarial=True)


def test_it_finds_what_the_science_room_finds(store, finished):
    trained = open_trained(store, "small", torch.device("cpu"))
    images = trained.data.test.choose(90)
    attacks = {
        "pgd-l2": lambda model, x, y, noise: pgd(model, x, y, Threat("l2", 0.5), steps=3, noise=noise),
        "fgsm-linf": lambda model, x, y, noise: pgd(
            model, x, y, Threat("linf", 0.05), steps=1, step_size=0.05, random_start=False
        ),
    }
    seed = derive_seed(0, "evaluate")
    known = evaluate(trained.model, to_float(images.images), images.labels, attacks, batch_size=20, seed=seed)
    found = matrix(finished)
    assert found["example"] == list(range(90))
    for index, name in enumerate(known.names):
        assert [bool(value) for value in found[name]] == known.correct[:, index].tolist()
    assert 0.1 < told(finished)["accuracy"]["best"]["robust/linf"] < 0.95  # neither all nor nothing stands


def test_only_what_stands_under_a_threat_is_attacked_again(finished):
    found = matrix(finished)
    clean, first, other, second = (found[name] for name in ("clean", "fgsm-linf", "pgd-l2", "pgd-linf"))
    assert [value is None for value in first] == [value is None for value in other] == [not value for value in clean]
    assert [value is None for value in second] == [not value for value in first]
    assert found["robust/linf"] == [bool(value) for value in second]
    assert found["robust/l2"] == [bool(value) for value in other]
    assert found["robust/union"] == [a and b for a, b in zip(found["robust/linf"], found["robust/l2"], strict=True)]
    assert sum(found["robust/linf"]) < sum(map(bool, first))  # the later stage does find more


def test_the_summary_is_what_the_matrix_says(finished):
    found, summary = matrix(finished), told(finished)
    for measure, share in summary["accuracy"]["best"].items():
        assert share == pytest.approx(sum(found[measure]) / 90)
        assert summary["intervals"][measure] == pytest.approx(wilson(share, 90))
    assert summary["threats"] == {
        "linf": {"norm": "linf", "eps": 1 / 20, "words": "linf eps 1/20"},
        "l2": {"norm": "l2", "eps": 0.5, "words": "l2 eps 0.5"},
    }
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert stages["pgd-linf"]["attack"] == "PGD, eps 1/20, loss cw, steps 5, restarts 2, random start"
    assert stages["pgd-linf"]["attacked"] == sum(map(bool, found["fgsm-linf"]))
    assert stages["pgd-linf"]["still_correct"] == summary["accuracy"]["best"]["robust/linf"]
    assert stages["pgd-linf"]["union"] == summary["accuracy"]["best"]["robust/union"]
    assert stages["fgsm-linf"]["gradients"] == stages["fgsm-linf"]["attacked"]
    assert stages["clean"]["queries"] == 90
    assert summary["warnings"] == []


L1 = {"norm": "l1", "eps": 2}
EVERY = [
    {"attack": "fgsm", "threat": LINF},
    {"attack": "pgd", "threat": L1, "steps": 3, "sparsity": [2, 5], "restarts": 2},
    {"attack": "apgd", "threat": L2, "steps": 10},
    {"attack": "apgd", "threat": L1, "steps": 10, "name": "apgd-l1"},
    {"attack": "apgd", "threat": LINF, "steps": 8, "loss": "targeted", "targets": 2, "restarts": 2},
    {"attack": "fab", "threat": L2, "steps": 5, "targets": 2, "restarts": 2},
    {"attack": "square", "threat": LINF, "queries": 40, "restarts": 2},
    {"attack": "msd", "threats": {"linf": "1/20", "l1": 2}, "steps": 5, "restarts": 2},
]


@pytest.fixture(scope="module")
def every(store: str) -> Run:
    return attacked(store, "every", attacks=EVERY, num_examples=40, batch_size=40)


def test_every_attack_keeps_to_what_was_estimated(every):
    stages = told(every)["stages"][1:]
    spec = spec_of("runs", "every", attacks=EVERY)
    assert [stage["name"] for stage in stages] == [
        "fgsm-linf", "pgd-l1", "apgd-ce-l2", "apgd-l1", "apgd-targeted-linf", "fab-l2", "square-linf", "msd-linf-l1"
    ]  # fmt: skip
    for stage, planned in zip(stages, spec.attacks, strict=True):
        gradients, queries = planned.spent()
        assert 0 < stage["queries"] <= queries * stage["attacked"], stage
        assert stage["gradients"] <= gradients * stage["attacked"], stage
        assert (stage["gradients"] == 0) == (stage["name"] == "square-linf")
    assert stages[4]["attack"] == "APGD, eps 1/20, loss targeted, steps 8, restarts 2, targets 2"
    assert stages[7]["attack"] == "MSD, linf eps 1/20 and l1 eps 2, steps 5, restarts 2"


def test_it_measures_what_it_says(store, every, assert_measured):
    tree = yaml.safe_load(every.read("spec.yaml"))
    assert_measured(RobustEvaluateSpec.model_validate(tree), every)


def test_a_union_of_balls_is_tried_on_what_stands_under_each(every):
    found, summary = matrix(every), told(every)
    alone = [a and b for a, b in zip(found["robust/linf"], found["robust/l1"], strict=True)]
    assert [value is not None for value in found["msd-linf-l1"]] == alone
    assert found["robust/linf+l1"] == [bool(value) for value in found["msd-linf-l1"]]
    assert summary["accuracy"]["best"]["robust/union"] <= summary["accuracy"]["best"]["robust/linf+l1"]


def test_autoattack_is_its_four_stages_under_each_threat(store):
    attacks = [{"attack": "autoattack", "threats": {"l2": 5, "linf": "1/2"}}]
    run = attacked(store, "standard", attacks=attacks, num_examples=8)
    parts = ["apgd-ce", "apgd-t", "fab-t", "square"]
    stages = told(run)["stages"][1:]
    assert [stage["name"] for stage in stages] == [f"aa-{part}-{norm}" for norm in ("l2", "linf") for part in parts]
    assert stages[1]["attack"] == "AutoAttack apgd-t, eps 5, loss targeted, steps 100, targets 9"
    assert told(run)["accuracy"]["best"]["robust/union"] == 0
    keys = [key for stage in spec_of("runs", "x", attacks=attacks).attacks for key in stage.keys]
    assert [part.name for part in standard(Threat("l2", 1), 10)] == list(AUTOATTACK)
    assert keys == [stage["name"] for stage in stages]


def test_square_is_surprising_only_after_attacks_with_gradients(store):
    square = {"attack": "square", "threat": LINF, "queries": 100}
    alone = told(attacked(store, "first", attacks=[square]))
    assert alone["stages"][1]["fooled"] > 0
    assert alone["warnings"] == []
    blind = {"attack": "pgd", "threat": LINF, "steps": 1, "step_size": "1e-9", "random_start": False}
    after = told(attacked(store, "second", attacks=[blind, square]))
    assert after["stages"][2]["fooled"] > 0
    assert "Square" in after["warnings"][0]


def test_two_radii_of_one_norm_are_two_threats(store):
    attacks = [
        {"attack": "fgsm", "threat": {"norm": "linf", "eps": eps}, "name": name}
        for name, eps in [("a", 0), ("b", "1/5")]
    ]
    run = attacked(store, "radii", attacks=attacks)
    accuracy = told(run)["accuracy"]["best"]
    assert list(accuracy) == ["clean", "robust/linf 0", "robust/linf 1/5", "robust/union"]
    assert accuracy["robust/linf 0"] == accuracy["clean"] > accuracy["robust/linf 1/5"] == accuracy["robust/union"]


def test_a_killed_evaluation_goes_on_where_it_stopped(store, finished, tmp_path, fork_server):
    """A process that is killed between chunks: what it has committed stays as it is, and the end is the same."""
    spec = spec_of(store, "killed", keep_adversarial=True)
    (tmp_path / "spec.yaml").write_text(dump(spec))
    arguments = ["-m", "poise", "run", str(tmp_path / "spec.yaml"), "--engine", "local"]
    with (tmp_path / "log").open("wb") as log:
        process = fork_server.start(arguments, log, log)
    run, deadline = open_run(store, "killed"), time.monotonic() + 60
    while len(run.files("artifacts/chunks/")) < 7 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    before = results(run)
    assert "result.json" not in before, "it was too fast to be killed"
    finish(spec)
    assert before.items() <= results(run).items()  # the seconds of a verdict are in its bytes: it was not made twice
    assert result(run) == result(finished)
    assert run.files("artifacts/chunks/") == finished.files("artifacts/chunks/")


class Ranks:
    """Workers of one worker group in threads of this process."""

    def __init__(self, count: int) -> None:
        self.values: list[object] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)

    def context(self, run: Run, rank: int) -> Context:
        def gather(value: object) -> list[object]:
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        context = Context(run, rank, len(self.values))
        context.gather = gather
        context.broadcast = lambda value: gather(value)[0]
        return context


def test_two_ranks_find_what_one_finds(store, finished):
    spec = spec_of(store, "shared", keep_adversarial=True)
    run, ranks = open_run(store, "shared"), Ranks(2)
    with ThreadPoolExecutor(2) as pool, claim(run, spec):
        for done in [pool.submit(kinds.run, spec, ranks.context(run, rank)) for rank in range(2)]:
            done.result()
    assert result(run) == result(finished)
    kept = finished.files("artifacts/adversarial/")
    assert run.files("artifacts/adversarial/") == kept
    assert [run.read(name) for name in kept] == [finished.read(name) for name in kept]


def test_a_verdict_that_is_damaged_is_named(store, finished):
    run = open_run(store, "torn")
    run.write("artifacts/chunks/clean/00001.parquet", finished.read("artifacts/chunks/clean/00001.parquet")[:200])
    with pytest.raises(IntegrityError, match=r"clean/00001.parquet is damaged .* remove that one file"):
        attacked(store, "torn")


class Broken(nn.Module):
    """Right on images of ones, and NaN for every image whose first pixel has this value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10] / (x.flatten(1).sum(1, keepdim=True) > 0)


def npz(folder: Path, images: np.ndarray) -> dict[str, object]:
    folder.mkdir()
    labels = np.arange(len(images)) % 2
    np.savez(folder / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return {"name": "npz", "root": str(folder), "validation": 0}


def test_an_output_that_is_not_finite_names_the_example(store, tmp_path, monkeypatch):
    images = np.random.default_rng(0).random((30, 1, 4, 4)).astype(np.float32)
    images[17] = 0
    (tmp_path / "own_broken.py").write_text("from test_run import Broken as broken\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(PoiseError, match=r"stage clean: example 17: .* not finite"):
        attacked(store, "nan", model={"function": "own_broken:broken"}, data=npz(tmp_path / "data", images))


def test_pixels_outside_the_box_are_refused(store, tmp_path, monkeypatch):
    images = np.full((30, 1, 4, 4), 1.5, np.float32)
    refused(store, "floats from 0 to 1", model={"function": "torch.nn:Flatten"}, data=npz(tmp_path / "data", images))


def exported(store: str, folder: Path, change=lambda tensors: tensors) -> str:
    state = open_trained(store, "small", torch.device("cpu")).model.state_dict()
    plain = {name: value.contiguous() for name, value in state.items()}
    save_file(change(plain), folder / "model.safetensors")
    return str(folder / "model.safetensors")


def test_a_plain_state_dict_is_evaluated_as_the_run_that_it_comes_from(store, finished, tmp_path):
    model = {"file": exported(store, tmp_path), "name": "cnn", "width": 4}
    data = {"name": "digits", "limit": 600, "validation": 50}
    assert matrix(attacked(store, "filed", model=model, data=data)) == matrix(finished)


def test_verdicts_on_other_weights_are_not_taken(store, finished, tmp_path):
    run = open_run(store, "mixed")
    for name in finished.files("artifacts/chunks/clean/"):
        run.write(name, finished.read(name))
    file = exported(store, tmp_path, lambda state: {name: 2 * value for name, value in state.items()})
    data = {"name": "digits", "limit": 600, "validation": 50}
    with pytest.raises(UserError, match="other weights or images"):
        attacked(store, "mixed", model={"file": file, "width": 4}, data=data)


@pytest.mark.parametrize("weights", ["best", "final", "averaged"])
def test_all_weights_of_a_run_can_be_chosen(store, finished, weights):
    run = attacked(
        store, f"of-{weights}", model={"run": "small", "checkpoint": weights}, attacks=ATTACKS[:1], num_examples=60
    )
    known = told(open_run(store, "small"))["accuracy"]
    assert told(run)["accuracy"][weights]["clean"] == known[weights]["clean"]
    same = told(run)["weights_sha256"] == told(finished)["weights_sha256"]
    assert same == (weights == "best") or weights == "final"  # the final weights may be the best ones


def test_a_run_without_an_average_has_no_averaged_weights(store):
    values = yaml.safe_load(open_run(store, "small").read("spec.yaml"))
    values |= {"name": "plain", "averaging": None, "train": {**values["train"], "epochs": 1}}
    finish(RobustTrainSpec.model_validate(values))
    refused(store, "has left no averaged weights", model={"run": "plain", "checkpoint": "averaged"})


FUNCTIONS = """\
import torch
import yaml
from torch import nn

def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def soft():
    return nn.Sequential(linear(), nn.Softmax(1))

class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = linear()

    def forward(self, x):
        return self.model(x.detach())

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = linear()

    def forward(self, x):
        return self.model(x + 0.3 * torch.randn_like(x))

def batched():
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), linear())

def scripted():
    return torch.jit.script(linear())
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"functions_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_of_the_users_own_is_evaluated(store, functions):
    run = attacked(store, "own", model={"function": f"{functions}:linear"}, data=DIGITS)
    summary = told(run)
    assert summary["model"] == f"function {functions}:linear"
    assert list(summary["accuracy"]) == ["function"]
    assert functions not in sys.path


def test_what_makes_a_result_doubtful_is_said(store, functions):
    run = attacked(store, "doubtful", model={"function": f"{functions}:soft"}, data=DIGITS, attacks=ATTACKS[:1])
    (warning,) = told(run)["warnings"]
    assert "probabilities" in warning
    assert [event["what"] for event in run.events() if event["event"] == "warning"] == [warning]


def test_a_black_box_evaluation_of_a_model_without_gradient_comes_to_its_end(store, functions):
    """And to the same end when it is run again."""
    square = {"attack": "square", "threat": LINF, "queries": 20}
    model = {"function": f"{functions}:Rounded"}
    run = attacked(store, "black-box", model=model, data=DIGITS, attacks=[square], num_examples=20)
    (warning,) = told(run)["warnings"]
    assert "no gradient for its input" in warning
    assert told(
        finish(spec_of(store, "black-box", model=model, data=DIGITS, attacks=[square], num_examples=20))
    ) == told(run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused(store, "no gradient for its input", model=model, data=DIGITS, num_examples=20)
    assert not [each for each in caught if "no gradient" in str(each.message)]  # the refusal says it


def test_a_warning_of_a_run_is_one_plain_line(store, functions, capfd):
    with warnings.catch_warnings():
        warnings.showwarning = _print_as_python_does  # pytest records them otherwise
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)  # others may come from what earlier tests have left
        attacked(
            store, "warned", model={"function": f"{functions}:soft"}, data=DIGITS, attacks=ATTACKS[:1], num_examples=20
        )
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("poise: warning: the model gives probabilities (rows that sum to 1) in place of logits")


def _print_as_python_does(message, category, filename, lineno, file=None, line=None):
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def test_a_result_that_hangs_on_the_batch_is_said_to(store, functions):
    run = attacked(store, "batched", model={"function": f"{functions}:batched"}, data=DIGITS, attacks=ATTACKS[:1])
    assert "depends on the batch size" in told(run)["warnings"][0]


def test_a_torchscript_model_is_evaluated_like_any_other(store, functions):
    plain, scripted = (
        attacked(
            store, name, model={"function": f"{functions}:{name}"}, data=DIGITS, attacks=ATTACKS[:2], num_examples=30
        )
        for name in ("linear", "scripted")
    )
    assert matrix(plain) == matrix(scripted)
    assert [stage["queries"] for stage in told(plain)["stages"]] == [
        stage["queries"] for stage in told(scripted)["stages"]
    ]


def test_a_randomised_model_is_attacked_in_the_mean_of_its_draws(store, functions):
    attacks = [
        {"attack": "pgd", "threat": LINF, "steps": 2, "draws": 4},
        {"attack": "autoattack", "threats": {"linf": "1/5"}, "version": "rand", "draws": 3},
    ]
    model = {"function": f"{functions}:Noisy"}
    run, same = (
        attacked(store, name, model=model, data=DIGITS, attacks=attacks, num_examples=60, keep_adversarial=True)
        for name in ("noisy", "noisy-again")
    )
    assert matrix(run) == matrix(same)  # what the model draws follows from the seed of the run
    stages, spec = told(run)["stages"][1:], spec_of("runs", "noisy", attacks=attacks)
    assert [stage["name"] for stage in stages] == ["pgd-linf", "aa-apgd-ce-linf", "aa-apgd-dlr-linf"]
    assert 0 < stages[0]["gradients"] <= 8 * stages[0]["attacked"]  # some are wrong in the mean as they are
    assert stages[0]["gradients"] % 8 == 0
    assert "draws 4" in stages[0]["attack"]
    assert "draws 3" in stages[2]["attack"]
    assert told(run)["warnings"] == []
    assert spec.attacks[1].spent() == (3 * 202, 3 * 204)
    again = attacked(store, "noisy-once", model=model, data=DIGITS, attacks=ATTACKS[:1], num_examples=12)
    assert "randomised" in told(again)["warnings"][0]


def test_targets_share_batches_in_a_job_as_they_do_in_the_function(store):
    """Nine runs of 12 examples fit into one batch of 128: a ninth of the passes, and the same verdicts."""
    trained = open_trained(store, "small", torch.device("cpu"))
    images = trained.data.test.select(slice(12))
    x, y = to_float(images.images), images.labels
    attacks = [
        {"attack": "apgd", "threat": LINF, "steps": 4, "loss": "targeted"},
        {"attack": "fab", "threat": LINF, "steps": 4},
    ]
    stages = spec_of("runs", "x", attacks=attacks).attacks
    for apart, together in zip(bind(stages, 10), bind(stages, 10, 128), strict=True):
        passes, chunk_results = [], []
        for stage in (apart, together):
            calls: list[int] = []
            hook = trained.model.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(1))
            chunk_results.append(stage.attack(trained.model, x, y, Noise.of(0, "a", range(12))).correct)
            hook.remove()
            passes.append(len(calls))
        assert torch.equal(*chunk_results)
        assert passes[1] < passes[0] / 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"run": "smal"}, "is it 'small'"),
        ({"run": "whole"}, "is a robust.evaluate; name a run of robust.train or sweep"),
    ],
)
def test_a_run_that_has_no_such_model_is_refused(store, finished, model, message):
    refused(store, message, model=model)


def test_kept_points_are_judged_again(store, finished):
    run = attacked(store, "again", model=None, num_examples=None, attacks=[], recheck={"run": "whole"})
    rows = pq.read_table(io.BytesIO(run.read("artifacts/rechecked.parquet"))).to_pylist()
    found, summary = matrix(finished), told(run)
    for stage in ("fgsm-linf", "pgd-l2", "pgd-linf"):
        fooled = [example for example, value in enumerate(found[stage]) if value is False]
        assert [row["example"] for row in rows if row["stage"] == stage] == fooled
        assert summary["rechecked"]["stages"][stage] == dict.fromkeys(("stored", "fools", "feasible"), len(fooled))
    assert all(row["excess"] <= 0 and row["outside"] == 0 and row["cw_loss"] > 0 for row in rows)
    assert summary["warnings"] == []


def test_drift_of_what_was_kept_is_seen(store, finished):
    """A run whose points were made under other weights, in a larger ball, and of which one is outside the box."""
    attacks = [{"attack": "pgd", "threat": {"norm": "linf", "eps": 0.2}, "steps": 3, "name": "far"}]
    spec = spec_of(store, "far", attacks=attacks, keep_adversarial=True, batch_size=90)
    run = finish(spec)
    near = spec.model_copy(update={"attacks": spec_of(store, "x", attacks=[{**attacks[0], "threat": LINF}]).attacks})
    run.write("spec.yaml", dump(near).encode())
    (name,) = run.files("artifacts/adversarial/")
    kept = load(run.read(name))
    trained = open_trained(store, "small", torch.device("cpu"))
    images = trained.data.test.choose(90).images
    kept["image"][0] = images[kept["example"][0]]  # back at the image, where the model is right
    kept["image"][1, 0, 0, 0] = 1.5
    data = save(kept)
    run.write(name, data)
    with pytest.raises(IntegrityError, match="SHA-256"):
        attacked(store, "not-vouched-for", model=None, num_examples=None, attacks=[], recheck={"run": "far"})
    chunk_result = name.replace("adversarial", "chunks").replace("safetensors", "parquet")
    table = pq.read_table(io.BytesIO(run.read(chunk_result)))
    told_of_it = json.loads(table.schema.metadata[b"poise"]) | {"sha256": hashlib.sha256(data).hexdigest()}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"poise": json.dumps(told_of_it)}), sink)
    run.write(chunk_result, sink.getvalue())
    again = attacked(store, "drift", model=None, num_examples=None, attacks=[], recheck={"run": "far"})
    rows = pq.read_table(io.BytesIO(again.read("artifacts/rechecked.parquet"))).to_pylist()
    assert (rows[0]["fools"], rows[0]["feasible"], rows[0]["excess"]) == (False, True, pytest.approx(-0.05, rel=1e-3))
    assert rows[1]["outside"] == pytest.approx(0.5)
    assert rows[2]["excess"] == pytest.approx(0.15, abs=1e-4)
    count = len(rows)
    assert told(again)["rechecked"]["stages"]["far"] == {"stored": count, "fools": count - 1, "feasible": 1}
    assert len(told(again)["warnings"]) == 2


def test_an_evaluation_that_has_not_come_to_its_end_is_not_judged_again(store):
    spec = spec_of(store, "stopped", keep_adversarial=True)
    run = open_run(store, "stopped")
    with claim(run, spec):
        pass
    refused(
        store, "'stopped' .* has no result yet", model=None, num_examples=None, attacks=[], recheck={"run": "stopped"}
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [("small", "is a robust.train; name a run of robust.evaluate"), ("unkept", "kept no adversarial example")],
)
def test_a_run_that_has_kept_nothing_is_refused(store, finished, name, message):
    if name == "unkept":
        attacked(store, "unkept", attacks=ATTACKS[:1])
    refused(store, message, model=None, num_examples=None, attacks=[], recheck={"run": name})


def test_it_is_shown_on_a_page_and_in_a_terminal(store, finished):
    record = load_record(finished, result_classes())
    page = render([record], "evaluation", report_sections())
    for text in ("Each stage attacks", "PGD, eps 1/20,", "Accuracy along the stages", "run small, best, test, n=90"):
        assert text in page
    assert isinstance(record.result, RobustEvaluateResult)
    union = record.result.accuracies["robust/union"]
    low, high = wilson(union, 90)
    assert f"{100 * low:.1f}\u2013{100 * high:.1f}" in page
    (axes,) = falling(record.result.stages).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["clean", "fgsm-linf", "pgd-l2", "pgd-linf"]
    assert lines["union"][-1] == union
    assert all(before >= after for line in lines.values() for before, after in pairwise(line))
    terminal = Console(file=io.StringIO(), width=80)
    for table in comparison([record], report_sections()):
        terminal.print(table)
    assert "pgd-linf" in terminal.file.getvalue()
    assert max(map(len, terminal.file.getvalue().splitlines())) <= 80
    again = attacked(store, "paged", model=None, num_examples=None, attacks=[], recheck={"run": "whole"})
    assert "Kept adversarial examples" in render([load_record(again, result_classes())], "again", report_sections())
