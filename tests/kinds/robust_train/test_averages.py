"""Averages, perturbed weights and monitors in a run of `robust.train`, against what its checkpoints hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, load_file

from fork_server import ForkServer
from poise import kinds
from poise.data.images.batches import load as load_data
from poise.errors import UserError
from poise.kinds.common.robust_accuracy import robust_accuracy
from poise.kinds.common.trained_classifier import classifier
from poise.kinds.robust_train import monitors as robust_watch
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.observe.rows import read_rows
from poise.robust.training.monitors import Probe
from poise.spec import SpecError, dump
from poise.spec.seeds import derive_seed
from poise.store.runs import Run, open_run
from poise.train.context import Context


def spec_of(**changes: Any) -> RobustTrainSpec:
    values = {
        "kind": "robust.train",
        "name": "small",
        "model": {"name": "vgg11", "width": 2},
        "data": {"name": "digits", "batch_size": 50, "limit": 250, "validation": 50},
        "threats": {"linf": {"eps": 0.05, "steps": 1}},
        "objective": {"name": "at"},
        "train": {"epochs": 4, "optimizer": {"name": "sgd", "lr": 0.1}, "checkpoint": {"keep": 10}},
        "evaluate": {"num_examples": 60},
    }
    return RobustTrainSpec.model_validate({**values, **changes})


def finished(folder: Path, **changes: Any) -> tuple[Run, dict[str, Any]]:
    run = open_run(folder / "runs", "small")
    kinds.run(spec_of(**changes), Context(run))
    return run, json.loads(run.read("result.json"))


def weights(run: Run, step: int, folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoints.fetch(run.checkpoints.at(step), folder / f"step-{step}") / "model.safetensors")


def values(run: Run, name: str) -> dict[int, float]:
    rows = read_rows(run.read(file) for file in run.files("metrics/rows-")).to_pylist()
    return {row["step"]: row["value"] for row in rows if row["name"] == name}


def test_swa_is_the_mean_of_the_epochs_behind_its_start_and_is_measured_as_it_is_kept(tmp_path: Path) -> None:
    run, summary = finished(tmp_path, averaging={"name": "swa", "start": {"epochs": 1}})
    kept = load(run.read("artifacts/averaged.safetensors"))
    iterates = [weights(run, step, tmp_path) for step in (8, 12, 16)]
    spec = spec_of()
    model = classifier(spec, data := load_data(spec.data, spec.seed))
    for name, _ in model.named_parameters():
        torch.testing.assert_close(kept[name], torch.stack([each[name] for each in iterates]).mean(0))
    means = [name for name in kept if name.endswith("running_mean")]
    assert means
    assert all(not torch.equal(kept[name], iterates[-1][name]) for name in means)
    model.load_state_dict(kept)
    again = robust_accuracy(
        model, data.test.choose(60), spec.threats, batch_size=256, seed=derive_seed(0, "evaluate"),
        context=Context(run),
    )  # fmt: skip
    assert summary["accuracy"]["averaged"] == again.summary()
    assert summary["selected"] == "best"
    best, final = summary["accuracy"]["best"], summary["accuracy"]["final"]
    assert summary["best_minus_final"] == {name: best[name] - final[name] for name in best}


def test_the_estimate_counts_the_average_and_the_perturbation(tmp_path: Path) -> None:
    options = {"train": {"steps": 4}, "averaging": {"name": "ema"}, "awp": {}}
    run, _ = finished(tmp_path, **options)
    plain, told = (spec_of(**more).cost() for more in ({"train": {"steps": 4}}, options))
    assert (plain[0], told[0]) == tuple(
        f"gradients per batch of 50: 1 for attacks, {count} for the loss" for count in (1, 2)
    )
    sizes = [float(re.search(r"([\d.]+) KiB per checkpoint", "\n".join(lines))[1]) for lines in (plain, told)]
    size = run.checkpoints.commits()[-1].size / 1024
    assert sizes[1] == pytest.approx(1.5 * sizes[0], rel=0.02)  # weights, momentum; and the average
    assert sizes[1] <= size <= sizes[1] + 40


def test_what_is_switched_off_is_the_method_itself(tmp_path: Path) -> None:
    """gamma 0 is the method without AWP, an anchor that does not pull is SWA: the same bits."""
    plain, _ = finished(tmp_path / "plain", train={"steps": 6}, averaging={"name": "swa", "every": {"steps": 2}})
    anchor = {"name": "mea", "proximal_weight": 0, "every": {"steps": 2}}
    off, _ = finished(tmp_path / "off", train={"steps": 6}, averaging=anchor, awp={"gamma": 0})
    one, other = (load(run.read("artifacts/averaged.safetensors")) for run in (plain, off))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    one, other = weights(plain, 6, tmp_path / "a"), weights(off, 6, tmp_path / "b")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    pulled, _ = finished(
        tmp_path / "on", train={"steps": 6}, averaging={**anchor, "proximal_weight": 1}, awp={"gamma": 0.01}
    )
    assert any(not torch.equal(v, one[name]) for name, v in weights(pulled, 6, tmp_path / "c").items())
    assert values(pulled, "proximal_term")[6] > 0


def test_every_batch_of_a_step_is_pulled_from_the_unperturbed_weights(tmp_path: Path) -> None:
    """At the first step w is the anchor, so that no batch is pulled, whatever AWP did for the batch before it."""
    anchor = {"name": "mea", "proximal_weight": 1, "every": {"steps": 1}}
    run, _ = finished(tmp_path, train={"steps": 1, "accumulate": 2}, averaging=anchor, awp={"gamma": 0.1})
    assert values(run, "proximal_term") == {1: 0.0}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Probe]]:
    """What the probe finds, look by look, instead of what is so."""
    found: list[Probe] = []
    monkeypatch.setattr(robust_watch, "probe", lambda *_, **__: found.pop(0))
    return found


def test_catastrophic_overfitting_stops_the_run_which_goes_back(tmp_path: Path, looks: list[Probe]) -> None:
    looks += [Probe(0.8, 0.7, 0.9), Probe(0.7, 0.6, 0.9), Probe(0.99, 0.1, 0.2)]
    run, summary = finished(tmp_path, monitors={"overfitting": {"stop": "restore"}})
    assert summary["stopped"]["step"] == 12
    assert "99.0% under FGSM and 10.0% under PGD and accuracy under PGD fell from 60.0%" in summary["stopped"]["why"]
    assert summary["step"] == 8
    assert summary["best_step"] <= 8
    assert values(run, "overfitting/alarm") == {4: 0, 8: 0, 12: 1}
    assert values(run, "overfitting/pgd") == {4: 0.7, 8: 0.6, 12: 0.1}
    told = [(event["event"], event["step"]) for event in run.events() if event["event"] in ("alarm", "restore")]
    assert told == [("alarm", 12), ("restore", 8)]
    looks += [Probe(0.99, 0.1, 0.2)]  # started again, it takes the same steps to the same alarm, with 60% before
    _, again = finished(tmp_path, monitors={"overfitting": {"stop": "restore"}})
    assert again == summary


def test_an_alarm_alone_changes_nothing(tmp_path: Path, looks: list[Probe]) -> None:
    looks += [Probe(0.9, 0.1, 0.2)] * 4
    run, summary = finished(tmp_path, monitors={"overfitting": {}})
    assert (summary["stopped"], summary["step"]) == (None, 16)
    assert [event["step"] for event in run.events() if event["event"] == "alarm"] == [4, 8, 12, 16]


def test_the_probe_looks_at_the_model_in_training(tmp_path: Path) -> None:
    run, _ = finished(tmp_path, monitors={"overfitting": {"num_examples": 20}, "robust_gap": True}, train={"steps": 4})
    assert all(math.isfinite(values(run, f"overfitting/{name}")[4]) for name in ("fgsm", "pgd", "cosine"))
    spec = spec_of()
    data = load_data(spec.data, spec.seed)
    model = classifier(spec, data)
    model.load_state_dict(weights(run, 4, tmp_path))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(derive_seed(0, "monitor")))
    both = [
        robust_accuracy(
            model, images, spec.threats, batch_size=256, seed=derive_seed(0, "evaluate"), context=Context(run)
        )
        for images in (data.train.select(order[:50]), data.validation)
    ]
    assert values(run, "gap/linf")[4] == both[0].summary()["robust/linf"] - both[1].summary()["robust/linf"]


def test_sequential_steps_take_each_batch_once_per_threat(tmp_path: Path) -> None:
    threats = {"linf": {"eps": 0.05, "steps": 1}, "l1": {"eps": 1, "steps": 1}}
    sequential = {"objective": {"name": "avg", "mode": "sequential"}, "threats": threats}
    train = {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}, "log_every": 1}
    run, summary = finished(tmp_path, train=train, **sequential)
    assert summary["step"] == 8  # 200 images in 4 batches, twice
    assert list(values(run, "loss/l1")) == [1, 3, 5, 7]
    assert list(values(run, "loss/linf")) == [2, 4, 6, 8]
    told = spec_of(train=train, **sequential).cost()
    assert told[1].startswith("8 optimizer steps, 1 epochs of 200 images: 200 images")


def test_an_average_that_never_moves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"averaging.start: nothing would happen in a run of 16 steps"):
        finished(tmp_path, averaging={"name": "swa", "start": {"epochs": 4}})
    with pytest.raises(UserError, match=r"awp.start"):
        finished(tmp_path, awp={"start": {"steps": 16}})


def test_keys_of_another_rule_and_a_gap_without_validation_are_refused() -> None:
    for average in ({"name": "mea"}, {"name": "ema"}, {"name": "swa", "start": {"epochs": 1}}):
        spec = spec_of(averaging=average, awp={}, monitors={"overfitting": {}})
        assert RobustTrainSpec.model_validate(yaml.safe_load(dump(spec))) == spec  # as the run keeps it
    with pytest.raises(ValueError, match="rate belongs to rule `const`"):
        spec_of(averaging={"name": "mea", "rate": 0.25})
    with pytest.raises((ValueError, SpecError), match="validation"):
        spec_of(data={"name": "digits", "validation": 0}, monitors={"robust_gap": True})


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path: Path, fork_server: ForkServer) -> None:
    """Without batch norm and noise: the direction of the weights is that of the whole batch, the anchor is shared."""
    threats = {"linf": {"eps": 0.05, "steps": 1, "random_start": False}}
    options: dict[str, Any] = {
        "model": {"name": "cnn", "width": 4},
        "threats": threats,
        "train": {"steps": 6, "optimizer": {"name": "sgd", "lr": 0.1}, "log_every": 1},
        "averaging": {"name": "mea", "proximal_weight": 0.5, "every": {"steps": 2}},
        "awp": {"gamma": 0.05},
        "monitors": {"overfitting": {"num_examples": 20, "gap": 1, "max_drop": 1}, "robust_gap": True},
    }
    alone, _ = finished(tmp_path / "alone", **options)
    spec = spec_of(store=str(tmp_path / "both"), workers={"count": 2}, **options)
    (tmp_path / "spec.yaml").write_text(dump(spec))
    done = fork_server.run_ranks(["-m", "poise", "run", str(tmp_path / "spec.yaml"), "--engine", "local"])
    assert done.returncode == 0, done.stderr
    both = open_run(tmp_path / "both", "small")
    one, two = (load(run.read("artifacts/averaged.safetensors")) for run in (alone, both))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    for name in ("loss", "proximal_term", "sum_lr"):
        assert values(both, name) == pytest.approx(values(alone, name), rel=1e-4)
