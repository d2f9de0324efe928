"""The kind as a whole, in this process: what it leaves behind agrees with itself and with the estimate made before."""

from __future__ import annotations

import io
import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from poise import kinds
from poise.kinds.common.trained_classifier import open_trained
from poise.kinds.robust_train.monitors import attacked
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.observe.rows import read_rows
from poise.spec import dump
from poise.store.runs import Run, open_run
from poise.train.context import Context


def spec_of(**changes: object) -> RobustTrainSpec:
    values = {
        "kind": "robust.train",
        "name": "small",
        "model": {"name": "cnn", "width": 4},
        "data": {"name": "digits", "batch_size": 100, "limit": 500, "validation": 50},
        "threats": {"linf": {"eps": 0.05, "steps": 2}, "l2": {"eps": 0.3, "steps": 2}},
        "train": {"epochs": 4, "optimizer": {"name": "sgd", "lr": 0.1}, "checkpoint": {"keep": 10}},
        "evaluate": {"threats": {"linf": {"eps": 0.02, "steps": 2}, "l1": {"eps": 1, "steps": 2}}, "num_examples": 80},
    }
    return RobustTrainSpec.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_run(tmp_path_factory.mktemp("runs"), "small")
    kinds.run(spec_of(), Context(run))
    return run


def test_the_summary_is_what_the_matrix_on_disk_says(finished):
    summary = json.loads(finished.read("result.json"))
    for label in ("best", "final"):
        matrix = pq.read_table(io.BytesIO(finished.read(f"artifacts/evaluation-{label}.parquet"))).to_pydict()
        told = summary["accuracy"][label]
        assert matrix.pop("example") == list(range(80))
        assert told["clean"] == pytest.approx(sum(matrix["clean"]) / 80)
        assert told["robust/l1"] == pytest.approx(sum(matrix["l1"]) / 80)
        together = [all(row) for row in zip(*matrix.values(), strict=True)]
        assert told["robust/union"] == pytest.approx(sum(together) / 80)
        assert told["robust/union"] <= min(told["robust/linf"], told["robust/l1"]) <= told["clean"]


def test_it_measures_what_it_says(finished, assert_measured):
    assert_measured(spec_of(), finished)


@pytest.mark.parametrize(
    "changes", [{"data": {"name": "digits", "batch_size": 100, "limit": 300, "validation": 0}}, {}]
)
def test_the_validation_split_is_measured_under_the_attacks_of_the_test_where_that_is_asked(
    changes, tmp_path, assert_measured
):
    """On images of the training set, of equal size and under equal attacks, as an evaluation of its own finds it."""
    evaluate = {"threats": {"linf": {"eps": 0.02, "steps": 2}}, "num_examples": 30, "validation": not changes}
    options = {"averaging": {"name": "ema", "decay": 0.5}, "monitors": {"robust_gap": not changes}, **changes}
    spec = spec_of(train={"epochs": 2, "optimizer": {"name": "sgd", "lr": 0.1}}, evaluate=evaluate, **options)
    run = open_run(tmp_path, "small")
    run.storage.create(run.key("spec.yaml"), dump(spec).encode())
    kinds.run(spec, Context(run))
    assert_measured(spec, run)
    summary = json.loads(run.read("result.json"))
    if changes:
        assert summary["validation"] == {}
        return
    assert set(summary["validation"]) == {"best", "final", "averaged"}
    assert summary["num_validation_examples"] == 30
    for weights in ("best", "averaged"):
        trained = open_trained(str(tmp_path), "small", torch.device("cpu"), weights)
        found = attacked(spec, spec.evaluate.threats, trained.model, trained.data.validation, Context(run))
        assert summary["validation"][weights] == found.summary()


def test_validation_under_the_attacks_of_the_test_needs_a_validation_split():
    with pytest.raises(ValidationError, match="needs a validation split"):
        spec_of(data={"name": "digits", "validation": 0}, evaluate={"validation": True})


def test_the_best_checkpoint_withstood_its_training_threats_best(finished):
    rows = read_rows(finished.read(name) for name in finished.files("metrics/rows-")).to_pylist()
    held_out = {row["name"] for row in rows if row["split"] == "validation"}
    assert held_out == {"clean", "robust/linf", "robust/l2", "robust/average", "robust/union"}
    unions = {r["step"]: r["value"] for r in rows if r["split"] == "validation" and r["name"] == "robust/union"}
    best = json.loads(finished.read("result.json"))["best_step"]
    assert unions[best] == max(unions.values())
    assert best == min(step for step, value in unions.items() if value == unions[best])


def test_the_weights_of_adt_sum_to_one_and_start_uniform_in_each_epoch(finished):
    rows = read_rows(finished.read(name) for name in finished.files("metrics/rows-")).to_pylist()
    weights = [row for row in rows if row["name"].startswith("weight/")]
    by_step: dict[int, float] = {}
    for row in weights:
        by_step[row["step"]] = by_step.get(row["step"], 0) + row["value"]
    assert list(by_step.values()) == pytest.approx([1.0] * len(by_step))
    assert len({row["value"] for row in weights}) > 2  # they do adapt


def test_the_estimate_of_steps_and_bytes_holds(finished):
    told = "\n".join(spec_of().cost())
    commits = finished.checkpoints.commits()
    assert f"{commits[-1].step:,} optimizer steps" in told
    kib = float(re.search(r"([\d.]+) KiB per checkpoint", told)[1])
    rng = 2 * (625 + 626) * 8  # generators are not estimated: a few KiB whatever the model
    assert kib * 1024 <= commits[-1].size <= kib * 1024 + rng + 16_384
    assert "4 for attacks, 2 for the loss" in told


def test_no_validation_split_means_that_the_final_checkpoint_is_the_best(tmp_path):
    run = open_run(tmp_path, "small")
    data = {"name": "digits", "batch_size": 100, "limit": 200, "validation": 0}
    kinds.run(spec_of(data=data, train={"steps": 3}), Context(run))
    summary = json.loads(run.read("result.json"))
    assert (summary["best_step"], summary["step"]) == (3, 3)
    assert summary["accuracy"]["best"] == summary["accuracy"]["final"]


def test_when_the_best_checkpoint_is_damaged_the_final_one_is_measured_and_it_is_said(tmp_path):
    run = open_run(tmp_path, "small")
    then_nothing = {"name": "linear", "points": [[0, 1], ["1/2", 0], [1, 0]]}  # later steps cannot be better
    spec = spec_of(train={"epochs": 4, "schedule": then_nothing, "checkpoint": {"keep": 10}})
    kinds.run(spec, Context(run))
    best = json.loads(run.read("result.json"))["best_step"]
    assert best < run.checkpoints.commits()[-1].step
    run.write(f"checkpoints/step-{best:08d}/model.safetensors", b"nothing")
    kinds.run(spec, Context(run))
    summary = json.loads(run.read("result.json"))
    assert (summary["selected"], list(summary["accuracy"])) == ("final", ["final"])
    (named,) = [event["what"] for event in run.events() if event["event"] == "damaged"]
    assert f"step-{best:08d}" in named


def test_the_model_of_the_run_is_not_touched_by_measuring(finished):
    """The weights that were committed last are those that training ended with, whatever was evaluated afterwards."""
    from safetensors.torch import load

    files = [finished.read(f"checkpoints/step-{c.step:08d}/model.safetensors") for c in finished.checkpoints.commits()]
    first, last = load(files[0]), load(files[-1])
    assert any(not torch.equal(first[name], last[name]) for name in first)
