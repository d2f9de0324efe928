"""Trained classifiers of runs of `robust.train`, opened from the store for other kinds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from poise.data.images.batches import Dataset, load
from poise.errors import IntegrityError, UserError
from poise.kinds.common.finished_run import FinishedRun, open_finished
from poise.kinds.common.target_model_spec import CLASSIFIER_KINDS
from poise.kinds.common.user_model import build_classifier, make_module
from poise.kinds.robust_train.result import RobustTrainResult
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.kinds.sweep.result import SweepResult
from poise.models.architectures import Shape
from poise.models.build import build
from poise.spec.seeds import derive_seed
from poise.store.inputs import check_inputs
from poise.store.result import require_result
from poise.store.runs import Run, open_run, wrong_kind
from poise.train.restore import load_checkpoint

__all__ = [
    "AVERAGED",
    "TrainedClassifier",
    "classifier",
    "open_trained",
    "open_training",
    "open_weights",
    "trained_runs",
]

AVERAGED = "artifacts/averaged.safetensors"
"""The state dict of the averaged model of a run with weight averaging."""


@dataclass(frozen=True)
class TrainedClassifier:
    """A trained classifier in eval mode.

    Attributes:
        name: of its run.
        spec: of its run.
        data: of its run.
        selected: which weights it has: best, final or averaged.
        step: the optimizer step of these weights.
    """

    name: str
    spec: RobustTrainSpec
    data: Dataset
    model: nn.Module
    selected: str
    step: int


def classifier(spec: RobustTrainSpec, data: Dataset) -> nn.Module:
    """The network of `spec` as its training starts, on the CPU.

    Raises:
        UserError: the function of the user's code that makes it fails, or does not fit the data.
    """
    seed = derive_seed(spec.seed, "model")
    if spec.model.function is not None:
        return build_classifier(spec.model, data.train, data.classes, seed)
    return build(spec.model, shape=data.shape, classes=data.classes, mean=data.mean, std=data.std, seed=seed)


def trained_runs(store: str, names: list[str]) -> tuple[list[str], list[str]]:
    """The runs of `robust.train` that `names` stand for, and the unfinished trials of sweeps.

    A sweep stands for all its trials.

    Raises:
        UserError: a run does not exist, has no result, or is of another kind.
    """
    runs = list[str]()
    unfinished = list[str]()
    for name in names:
        run = open_run(store, name, must_exist=True)
        manifest = run.manifest()
        kind = "robust.train" if manifest is None else manifest.kind
        if kind == "sweep":
            trials = require_result(run, SweepResult).trials
            finished = [trial.run for trial in trials if trial.status == "finished"]
            unfinished += [trial.run for trial in trials if trial.status != "finished"]
            runs += trained_runs(store, finished)[0]
        elif kind == "robust.train":
            require_result(run, RobustTrainResult)
            runs.append(name)
        else:
            raise UserError(wrong_kind(name, kind, CLASSIFIER_KINDS))
    return list(dict.fromkeys(runs)), unfinished


def open_trained(store: str, name: str, device: torch.device, weights: str | None = None) -> TrainedClassifier:
    """Read the data and the "best", "final" or "averaged" weights of a finished run, by default its selected ones.

    Raises:
        UserError: the run has no such weights, or its data have changed since it was trained.
        IntegrityError: the weights are damaged.
    """
    finished = open_training(store, name, unchanged_inputs=True)
    spec = finished.spec
    data = load(spec.data, spec.seed)
    model = classifier(spec, data).to(device)
    selected, step = _load_weights(model, finished, weights, device)
    return TrainedClassifier(name, spec, data, model.eval(), selected, step)


def open_weights(
    store: str, name: str, shape: Shape, classes: int, device: torch.device, weights: str | None = None
) -> tuple[nn.Module, str]:
    """The classifier of a finished run in eval mode, and which weights it has. The data are not read.

    Raises:
        UserError, IntegrityError: as `open_trained`.
    """
    finished = open_training(store, name)
    spec = finished.spec
    if spec.model.function is not None:
        check_inputs(finished.run, spec, code_only=True)
        model = make_module(spec.model, derive_seed(spec.seed, "model")).to(device)
    else:
        mean = (0.0,) * shape[0]  # mean and std are replaced by those of the checkpoint
        std = (1.0,) * shape[0]
        model = build(spec.model, shape=shape, classes=classes, mean=mean, std=std, seed=0).to(device)
    selected, _ = _load_weights(model, finished, weights, device)
    return model.eval(), selected


def open_training(
    store: str, name: str, *, unchanged_inputs: bool = False
) -> FinishedRun[RobustTrainSpec, RobustTrainResult]:
    """A finished run of `robust.train`; see `open_finished`."""
    return open_finished(store, name, RobustTrainSpec, RobustTrainResult, unchanged_inputs=unchanged_inputs)


def _load_weights(
    model: nn.Module,
    finished: FinishedRun[RobustTrainSpec, RobustTrainResult],
    weights: str | None,
    device: torch.device,
) -> tuple[str, int]:
    """Load the weights of this name, by default the selected ones; their name and their step."""
    selected = weights or finished.result.selected
    step = finished.result.step_of(selected)
    if selected == "averaged":
        model.load_state_dict(_read_averaged(finished.run))
    else:
        load_checkpoint(model, finished.run, step, device)
    return selected, step


def _read_averaged(run: Run) -> dict[str, Tensor]:
    try:
        return dict(load_tensors(run.read(AVERAGED)))
    except FileNotFoundError:
        raise UserError(f"run {run.name!r} has left no averaged weights: it has best and final ones") from None
    except SafetensorError as error:
        raise IntegrityError(f"{run.url}/{AVERAGED} is damaged: {error}") from None
