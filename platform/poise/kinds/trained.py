"""Classifiers that runs of `robust.train` have left in the store, opened again for other kinds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from poise.data.batches import Dataset, load
from poise.errors import DamagedError, UserError
from poise.kinds.specs.robust import RobustTrainSpec
from poise.models.build import build
from poise.models.plans import Shape
from poise.spec.seeds import derive_seed
from poise.store.inputs import check_inputs
from poise.store.runs import Run, open_run
from poise.store.storage import scratch_folder
from poise.train.state import load_weights

__all__ = [
    "AVERAGED",
    "Trained",
    "classifier",
    "open_trained",
    "open_weights",
    "trained_runs",
    "trained_spec",
]

AVERAGED = "artifacts/averaged.safetensors"
"""Where a run keeps its averaged model, if it has one: a plain state dict."""


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


def open_trained(store: str, name: str, device: torch.device, weights: str | None = None) -> Trained:
    """Read the data and the "best", "final" or "averaged" weights of a finished run, by default what it has selected.

    Raises:
        UserError: the run has no such weights, or its data are not those any more that it was trained on.
        DamagedError: the weights are not whole.
    """
    spec = trained_spec(store, name)
    data = load(spec.data, spec.seed)
    run, model = open_run(store, name), classifier(spec, data).to(device)
    selected, step = _load(model, run, weights, device)
    return Trained(name, spec, data, model.eval(), selected, step)


def open_weights(
    store: str, name: str, shape: Shape, classes: int, device: torch.device, weights: str | None = None
) -> tuple[nn.Module, str]:
    """The classifier of a finished run in eval mode, and which weights it has; the data are not read.

    Raises:
        UserError, DamagedError: as `open_trained`.
    """
    run = open_run(store, name, must_exist=True)
    spec = RobustTrainSpec.model_validate(yaml.safe_load(run.read("spec.yaml")))
    mean, std = (0.0,) * shape[0], (1.0,) * shape[0]  # those of the checkpoint replace them
    model = build(spec.model, shape=shape, classes=classes, mean=mean, std=std, seed=0).to(device)
    selected, _ = _load(model, run, weights, device)
    return model.eval(), selected


def trained_spec(store: str, name: str) -> RobustTrainSpec:
    """The spec of a run. UserError where its data are not those any more that it was trained on."""
    run = open_run(store, name, must_exist=True)
    spec = RobustTrainSpec.model_validate(yaml.safe_load(run.read("spec.yaml")))
    check_inputs(run, spec)
    return spec


def _load(model: nn.Module, run: Run, weights: str | None, device: torch.device) -> tuple[str, int]:
    """Load the weights of this name; which they are, and of which step."""
    summary = _summary(run)
    selected = weights or summary["selected"]
    step = summary["best_step" if selected == "best" else "step"]
    if selected == "averaged":
        model.load_state_dict(_averaged(run))
    else:
        with scratch_folder() as scratch:
            folder = run.checkpoints.fetch(run.checkpoints.at(step), scratch / "checkpoint")
            load_weights(model, folder, device)
    return selected, step


def _averaged(run: Run) -> dict[str, Tensor]:
    try:
        return dict(load_tensors(run.read(AVERAGED)))
    except FileNotFoundError:
        raise UserError(f"run {run.name!r} has left no averaged weights: it has best and final ones") from None
    except SafetensorError as error:
        raise DamagedError(f"{run.url}/{AVERAGED} is damaged: {error}") from None


def _summary(run: Run) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(run.read("artifacts/summary.json"))
    except FileNotFoundError:
        raise UserError(f"run {run.name!r} in {run.storage.url} has no result yet: run it to its end first") from None
    return summary
