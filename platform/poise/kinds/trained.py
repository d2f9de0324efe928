"""Classifiers that runs of `robust.train` have left in the store, opened again for other kinds."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from poise.data.batches import Dataset, load
from poise.errors import UserError
from poise.kinds.specs.robust import RobustTrainSpec
from poise.models.build import build
from poise.spec.seeds import derive_seed
from poise.store.runs import Run, open_run
from poise.train.state import load_weights

__all__ = ["Trained", "classifier", "open_trained", "trained_runs"]


@dataclass(frozen=True)
class Trained:
    """A trained classifier in eval mode with the weights of `step`; `selected` says which these are."""

    name: str
    spec: RobustTrainSpec
    data: Dataset
    model: nn.Module
    selected: str
    step: int


def classifier(spec: RobustTrainSpec, data: Dataset) -> nn.Module:
    """The network of `spec` as its training starts, on the CPU."""
    seed = derive_seed(spec.seed, "model")
    return build(spec.model, shape=data.shape, classes=data.classes, mean=data.mean, std=data.std, seed=seed)


def trained_runs(store: str, names: list[str]) -> tuple[list[str], list[str]]:
    """The runs of `robust.train` behind names of the store, and the trials of sweeps that did not come to their end.

    A sweep stands for all its trials. UserError for a run that is not there, has no result, or is of another kind.
    """
    found, unfinished = list[str](), list[str]()
    for name in names:
        run = open_run(store, name, must_exist=True)
        summary = _summary(run)
        if summary["kind"] == "sweep":
            ended = [trial["run"] for trial in summary["trials"] if trial["status"] == "finished"]
            unfinished += [trial["run"] for trial in summary["trials"] if trial["status"] != "finished"]
            found += trained_runs(store, ended)[0]
        elif summary["kind"] == "robust.train":
            found.append(name)
        else:
            raise UserError(f"run {name!r} is a {summary['kind']} and trains no classifier; name a robust.train")
    return list(dict.fromkeys(found)), unfinished


def open_trained(store: str, name: str, device: torch.device, checkpoint: str | None = None) -> Trained:
    """Read the data and a checkpoint ("best", "final") of a finished run, by default the one that it has selected.

    UserError when the run has no such checkpoint, DamagedError when that is not whole.
    """
    run = open_run(store, name, must_exist=True)
    summary, spec = _summary(run), RobustTrainSpec.model_validate(yaml.safe_load(run.read("spec.yaml")))
    data, selected = load(spec.data, spec.seed), checkpoint or summary["selected"]
    steps = {"best": summary["best_step"], "final": summary["step"]}
    if selected not in steps:
        raise UserError(f"run {name!r} has left no {selected} weights: choose one of {', '.join(steps)}")
    model, step = classifier(spec, data).to(device), steps[selected]
    with tempfile.TemporaryDirectory(prefix="poise-") as scratch:
        folder = run.checkpoints.fetch(run.checkpoints.at(step), Path(scratch) / "checkpoint")
        load_weights(model, folder, device)
    return Trained(name, spec, data, model.eval(), selected, step)


def _summary(run: Run) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(run.read("artifacts/summary.json"))
    except FileNotFoundError:
        raise UserError(f"run {run.name!r} in {run.storage.url} has no result yet: run it to its end first") from None
    return summary
