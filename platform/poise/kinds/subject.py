"""The classifier under test, from wherever it comes: a run, a state dict, a function of the user's own."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from poise.data.batches import Dataset, load
from poise.data.sets import ImageSet, unit_pixels
from poise.data.spec import DataSpec
from poise.errors import UserError
from poise.kinds.specs.evaluation import SubjectSpec
from poise.kinds.trained import open_trained, trained_runs
from poise.models.build import build
from poise.robust.attacks import attack_mode
from poise.store.storage import open_storage

__all__ = ["Subject", "open_subject"]


@dataclass(frozen=True)
class Subject:
    """A classifier on its device, in eval mode: images (N, ...) in [0, 1] to logits (N, num_classes).

    `weights` tells of which weights: best, final, averaged, file or function. `digest` is the SHA-256 of all of them.
    """

    model: nn.Module
    data: Dataset
    weights: str
    num_classes: int
    digest: str

    def split(self, name: str, examples: int | None) -> ImageSet:
        """The first `examples` images of a split. UserError when it has none."""
        images: ImageSet = getattr(self.data, name).select(slice(examples))
        if not len(images):
            raise UserError(f"split: there are no {name} images to attack")
        return images


def open_subject(spec: SubjectSpec, data: DataSpec | None, *, store: str, seed: int, device: torch.device) -> Subject:
    """Open model and data; without `data`, those of the run.

    Raises:
        UserError: nothing there, weights of another architecture, or a module that does not classify these images.
        DamagedError: the checkpoint of the run is not whole.
    """
    known = load(data, seed) if data is not None else None
    if spec.run is not None:
        model, own, weights = _of_run(spec.run, spec.checkpoint, store, device)
        known = known or own
    else:
        assert known is not None  # the spec asks for data
        model, weights = (_of_file(spec, known) if spec.file is not None else _of_function(spec)), spec.source
    model = model.to(device).eval()
    classes = _num_classes(model, known, device)
    return Subject(model, known, weights, classes, _digest(model))


def _of_run(name: str, checkpoint: str | None, store: str, device: torch.device) -> tuple[nn.Module, Dataset, str]:
    if trained_runs(store, [name])[0] != [name]:
        raise UserError(f"model.run: {name!r} is a sweep: name one of its trials")
    trained = open_trained(store, name, device, checkpoint)
    return trained.model, trained.data, trained.selected


def _of_file(spec: SubjectSpec, data: Dataset) -> nn.Module:
    tensors = _tensors(str(spec.file))
    model = build(spec, shape=data.shape, classes=data.classes, mean=data.mean, std=data.std, seed=0)
    if differences := _differences(model.state_dict(), tensors):
        raise UserError(
            f"{spec.file} is not the state dict of this {spec.name}: {differences}; {_normalisation(spec, tensors)}"
        )
    model.load_state_dict(tensors)
    return model


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


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
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


def _normalisation(spec: SubjectSpec, tensors: Mapping[str, Tensor]) -> str:
    if {"normalize.mean", "normalize.std"} <= set(tensors):
        advice = "" if spec.normalize == "data" else ": set model.normalize to data"
        return f"the file has a normalisation inside{advice}"
    advice = ": set model.normalize to none, or add the two" if spec.normalize == "data" else ""
    return f"the file has no normalisation inside (normalize.mean, normalize.std){advice}"


def _of_function(spec: SubjectSpec) -> nn.Module:
    """What the user's function returns. The folder where the command was given is searched for its module first."""
    module, _, name = str(spec.function).partition(":")
    with _explained(f"model.function: {spec.function}"):
        here = str(Path.cwd())
        sys.path.insert(0, here)
        try:
            function = getattr(importlib.import_module(module), name)
        finally:
            sys.path.remove(here)
        model = function()
    if not isinstance(model, nn.Module):
        raise UserError(f"model.function: {spec.function} returned a {type(model).__name__}, not an nn.Module")
    return model


def _num_classes(model: nn.Module, data: Dataset, device: torch.device) -> int:
    """Of how many classes the model has a logit, by showing it two images."""
    x = unit_pixels(data.test.images[:2].to(device))
    with _explained(f"the model does not take images {data.shape}"), attack_mode(model), torch.no_grad():
        logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
        shown = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the model gives {shown} for {len(x)} images: logits (N, classes) of floats are needed")
    if logits.shape[1] < data.classes:
        raise UserError(f"the model tells {logits.shape[1]} classes apart and the data set has {data.classes}")
    return int(logits.shape[1])


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever goes wrong in code that is not ours, as an error of the one who asked for it."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {error}") from error


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
