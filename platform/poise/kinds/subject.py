"""The classifier under test, from wherever it comes: a run, a state dict, a function of the user's own."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from poise.data.batches import Split, load_split
from poise.data.sets import ImageSet, unit_pixels
from poise.data.spec import DataSpec
from poise.errors import UserError
from poise.kinds.specs.evaluation import SubjectSpec
from poise.kinds.trained import open_weights, trained_runs, trained_spec
from poise.kinds.user_model import UserModel
from poise.models.build import build
from poise.models.plans import Shape
from poise.robust.attacks import attack_mode
from poise.store.storage import open_storage
from poise.user_code import explain_errors

__all__ = ["Opened", "Subject", "as_called", "count_classes", "match_state_dict", "open_model", "open_subject"]

_T = TypeVar("_T")

_WRAPPERS = {"module": "torch.nn.DataParallel", "_orig_mod": "torch.compile"}
"""What is added to the names of a wrapped model, by the wrapper that adds it."""

_COUNTER = "n_averaged"
"""The one tensor that torch's AveragedModel has besides those of its `module`."""


@dataclass(frozen=True)
class Opened:
    """A module, where its weights come from (best, final, averaged, file or function), and what was done to them."""

    model: nn.Module
    weights: str
    note: str | None = None


@dataclass(frozen=True)
class Subject:
    """A classifier on its device, in eval mode: images (N, ...) in [0, 1] to logits (N, num_classes).

    `images` are those of one split. `weights` tells of which weights: best, final, averaged, file or function; `note`
    what was done to them before they fitted. `digest` is the SHA-256 of all of them.
    """

    model: nn.Module
    images: ImageSet
    weights: str
    num_classes: int
    digest: str
    note: str | None = None

    def choose(self, examples: int | None) -> ImageSet:
        """A stratified choice of `examples` images, the same for every seed; all when it is None."""
        return self.images.choose(examples)


def open_subject(
    spec: SubjectSpec,
    data: DataSpec | None,
    *,
    store: str,
    seed: int,
    device: torch.device,
    split: Literal["train", "validation", "test"] = "test",
) -> Subject:
    """Open the model, and one split of the data; without `data`, of those of the run. Nothing else is decoded.

    Raises:
        UserError: nothing there, weights of another architecture, or a module that does not classify these images.
        DamagedError: the checkpoint of the run is not whole.
    """
    if spec.run is not None and trained_runs(store, [spec.run])[0] != [spec.run]:
        raise UserError(f"model.run: {spec.run!r} is a sweep: name one of its trials")
    if data is None:
        assert spec.run is not None  # the spec asks for data
        trained = trained_spec(store, spec.run)
        data, seed = trained.data, trained.seed
    known = load_split(data, seed, split)
    if not len(known.images):
        raise UserError(f"split: there are no {split} images to attack")
    if spec.run is not None:
        opened = _of_run(spec, known, store, device)
    else:
        opened = open_model(spec, known.shape, known.classes, device)
    model = opened.model
    classes = count_classes(model, known.images, known.classes)
    return Subject(as_called(model, spec, classes), known.images, opened.weights, classes, _digest(model), opened.note)


def open_model(spec: SubjectSpec, shape: Shape, classes: int, device: torch.device) -> Opened:
    """The model of a file, of a function, or of a function with the weights of a file, in eval mode.

    Raises:
        UserError: nothing there, weights of another architecture, or a module that cannot be moved to the device.
    """
    if spec.function is not None:
        model = _of_function(spec)
    else:
        mean, std = (0.0,) * shape[0], (1.0,) * shape[0]  # those of the file replace them
        model = build(spec, shape=shape, classes=classes, mean=mean, std=std, seed=0)
    note = _load_file(model, spec) if spec.file is not None else None
    name = str(spec.function or spec.file)
    with explain_errors(f"the model {name} cannot be prepared"):
        model = model.to(device).eval()
        _check_state(model, name)
    return Opened(model, spec.source, note)


def as_called(model: nn.Module, spec: SubjectSpec, num_classes: int) -> nn.Module:
    """The model, once it has shown its `num_classes`; what one of the user's own raises later is explained."""
    return model if spec.function is None else UserModel(model, spec.function, num_classes)


def _check_state(model: nn.Module, name: str) -> None:
    """UserError for a state dict that is not of tensors alone: its digest could not be told."""
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"the model {name} has {key} in its state dict, which is a {type(value).__name__}, not a tensor: keep "
                "it out of there, or make it a buffer"
            )


def _of_run(spec: SubjectSpec, data: Split, store: str, device: torch.device) -> Opened:
    model, selected = open_weights(store, str(spec.run), data.shape, data.classes, device, spec.checkpoint)
    return Opened(model, selected)


def _load_file(model: nn.Module, spec: SubjectSpec) -> str | None:
    """Load the state dict of the file; what its names were freed of, if they were."""
    tensors, note = match_state_dict(spec, model.state_dict(), _tensors(str(spec.file)))
    model.load_state_dict(tensors)
    return note


def match_state_dict(
    spec: SubjectSpec, own: Mapping[str, Any], given: Mapping[str, _T]
) -> tuple[dict[str, _T], str | None]:
    """The tensors of the file under the names of the model, and a note of what their names were freed of.

    Only names and shapes are compared: `own` may be on the meta device and `given` the header of the file.

    Raises:
        UserError: the file holds the weights of another architecture; it names the first that differ.
    """
    tensors, note = _unwrapped(given, own)
    if differences := _differences(own, tensors):
        what = f"what {spec.function} returns" if spec.function else f"this {spec.name}"
        hint = "" if spec.function else f"; {_normalisation(spec, tensors)}"
        raise UserError(f"{spec.file} is not the state dict of {what}: {differences}{hint}")
    return dict(tensors), note


def _tensors(path: str) -> Mapping[str, Tensor]:
    folder, _, file = path.rpartition("/")
    if not file.endswith(".safetensors"):
        raise UserError(
            f"model.file: {path} is no .safetensors file, and pickles are never read: convert it with "
            "safetensors.torch.save_file(state_dict, 'model.safetensors')"
        )
    storage = open_storage(folder or ("/" if path.startswith("/") else "."))
    try:
        tensors: Mapping[str, Tensor] = load_tensors(storage.read(file))
    except FileNotFoundError:
        raise UserError(f"model.file: there is no {storage.url}/{file}") from None
    except SafetensorError as error:
        raise UserError(f"model.file: {storage.url}/{file} is damaged: {error}") from None
    return tensors


def _unwrapped(tensors: Mapping[str, _T], own: Mapping[str, Any]) -> tuple[Mapping[str, _T], str | None]:
    """The tensors under the names of the model itself, and a note where wrappers had added to them.

    `module.` stands before all names of a model in DataParallel; `_orig_mod.` stands wherever something was compiled.
    A model whose own names contain these is left alone.
    """
    named = {name: value for name, value in tensors.items() if name != _COUNTER}
    removed: set[str] = set()
    while named and all(name.startswith(("module.", "_orig_mod.")) for name in named):
        removed |= {name.partition(".")[0] for name in named}
        named = {name.partition(".")[2]: value for name, value in named.items()}
    if any("._orig_mod." in name for name in named):
        removed.add("_orig_mod")
        named = {re.sub(r"\._orig_mod(?=\.)", "", name): value for name, value in named.items()}
    if not removed or len(own.keys() & named.keys()) <= len(own.keys() & tensors.keys()):
        return tensors, None
    wrappers = " and ".join(f"{prefix}. (of {_WRAPPERS[prefix]})" for prefix in sorted(removed))
    return named, f"{wrappers} left out of the names of its weights"


def _differences(own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What a file has too much, too little and in another shape, a few names of each; "" where it fits."""
    shapes = [
        f"{name} is {list(given[name].shape)}, not {list(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    found = {
        "missing": [name for name in own if name not in given],
        "unknown": [name for name in given if name not in own],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in found.items() if names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _normalisation(spec: SubjectSpec, tensors: Mapping[str, Any]) -> str:
    if {"normalize.mean", "normalize.std"} <= set(tensors):
        advice = "" if spec.normalize == "data" else ": set model.normalize to data"
        return f"the file has a normalisation inside{advice}"
    advice = ": set model.normalize to none, or add the two" if spec.normalize == "data" else ""
    return f"the file has no normalisation inside (normalize.mean, normalize.std){advice}"


def _of_function(spec: SubjectSpec) -> nn.Module:
    """What the user's function returns. The folder where the command was given is searched for its module first."""
    module, _, name = str(spec.function).partition(":")
    with explain_errors(f"model.function: {spec.function}"):
        here = str(Path.cwd())
        sys.path.insert(0, here)
        try:
            function = getattr(importlib.import_module(module), name)
            model = function(**spec.arguments)
        finally:
            sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise UserError(f"model.function: {spec.function} returned a {type(model).__name__}, not an nn.Module")
    return model


def count_classes(model: nn.Module, images: ImageSet, classes: int, name: str = "the model") -> int:
    """The number of classes that the model, in messages `name`, has a logit for, by showing it two images.

    Raises:
        UserError: the forward of the model fails, or it does not return logits of at least so many `classes`.
    """
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    x = unit_pixels(images.images[:2].to(device))
    shape = tuple(x.shape[1:])
    fitting = explain_errors(f"{name} does not take images {shape}", defect=f"{name} fails on images {shape}")
    with fitting, attack_mode(model), torch.no_grad():
        logits = model(x)
    failing = explain_errors(f"{name} fails on images {shape} that need a gradient")
    with failing, attack_mode(model), torch.enable_grad():
        model(x.clone().requires_grad_().clone())
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
        shown = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{name} gives {shown} for {len(x)} images: logits (N, classes) of floats are needed")
    if logits.shape[1] < classes:
        raise UserError(f"{name} tells {logits.shape[1]} classes apart and the data set has {classes}")
    return int(logits.shape[1])


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
