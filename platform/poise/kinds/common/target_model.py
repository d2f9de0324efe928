"""The classifier under test: from a run, a state dict, or a function of the user's code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from poise.data.images.batches import Split, load_split
from poise.data.images.datasets import ImageSet
from poise.data.images.spec import DataSpec
from poise.errors import UserError
from poise.kinds.common.target_model_spec import TargetModelSpec
from poise.kinds.common.trained_classifier import open_training, open_weights, trained_runs
from poise.kinds.common.user_model import UserModel, call_function, check_state, count_classes
from poise.models.architectures import Shape
from poise.models.build import build
from poise.store.storage import open_storage
from poise.user_code import explain_errors

__all__ = [
    "OpenedModel",
    "TargetModel",
    "match_state_dict",
    "open_model",
    "open_target_model",
    "wrap_user_model",
]

_T = TypeVar("_T")

_WRAPPERS = {"module": "torch.nn.DataParallel", "_orig_mod": "torch.compile"}
"""The prefixes that wrappers add to the names of a state dict -> the wrapper."""

_COUNTER = "n_averaged"
"""The one tensor that torch's AveragedModel adds to those of its `module`."""


@dataclass(frozen=True)
class OpenedModel:
    """A module in eval mode.

    Attributes:
        weights: where its weights come from: best, final, averaged, file or function.
        note: how the names in its file were changed; None where they were not.
        function: the function of the user's code that made the module; None for a network of Poise.
    """

    model: nn.Module
    weights: str
    note: str | None = None
    function: str | None = None


@dataclass(frozen=True)
class TargetModel:
    """A classifier on its device, in eval mode: images (N, ...) in [0, 1] to logits (N, num_classes).

    Attributes:
        images: of one split.
        weights: where its weights come from: best, final, averaged, file or function.
        digest: SHA-256 of all weights and buffers.
        note: how the names in its file were changed; None where they were not.
    """

    model: nn.Module
    images: ImageSet
    weights: str
    num_classes: int
    digest: str
    note: str | None = None

    def choose(self, examples: int | None) -> ImageSet:
        """A stratified choice of `examples` images, the same for every seed; all images for None."""
        return self.images.choose(examples)


def open_target_model(
    spec: TargetModelSpec,
    data: DataSpec | None,
    *,
    store: str,
    seed: int,
    device: torch.device,
    split: Literal["train", "validation", "test"] = "test",
) -> TargetModel:
    """Open the model and one split of the data; without `data`, of the data of the run. No other split is decoded.

    Raises:
        UserError: no such model, weights of another architecture, or a module that does not classify these images.
        IntegrityError: the checkpoint of the run is not whole.
    """
    if spec.run is not None and trained_runs(store, [spec.run])[0] != [spec.run]:
        raise UserError(f"model.run: {spec.run!r} is a sweep: name one of its trials")
    if data is None:
        assert spec.run is not None  # without a run, the spec requires data
        run_spec = open_training(store, spec.run, unchanged_inputs=True).spec
        data = run_spec.data
        seed = run_spec.seed
    images = load_split(data, seed, split)
    if not len(images.images):
        raise UserError(f"split: there are no {split} images to attack")
    if spec.run is not None:
        opened = _open_run_model(spec, images, store, device)
    else:
        opened = open_model(spec, images.shape, images.classes, device)
    model = opened.model
    classes = count_classes(model, images.images, images.classes)
    wrapped = wrap_user_model(opened, classes)
    return TargetModel(wrapped, images.images, opened.weights, classes, _digest(model), opened.note)


def open_model(spec: TargetModelSpec, shape: Shape, classes: int, device: torch.device) -> OpenedModel:
    """The model of a file, of a function, or of a function with the weights of a file, in eval mode.

    Raises:
        UserError: no such file or function, weights of another architecture, or a module that cannot be moved to the
            device.
    """
    if spec.function is not None:
        model = call_function(spec.function, spec.arguments, "model.function")
    else:
        channels = shape[0]
        mean = (0.0,) * channels  # mean and std are replaced by those of the file
        std = (1.0,) * channels
        model = build(spec, shape=shape, classes=classes, mean=mean, std=std, seed=0)
    note = _load_file(model, spec) if spec.file is not None else None
    name = str(spec.function or spec.file)
    with explain_errors(f"the model {name} cannot be prepared"):
        model = model.to(device).eval()
        check_state(model, name)
    return OpenedModel(model, spec.source, note, spec.function)


def wrap_user_model(opened: OpenedModel, num_classes: int) -> nn.Module:
    """The model; one from the user's code is wrapped so that its errors are explained.

    `num_classes`: from `count_classes`.
    """
    return opened.model if opened.function is None else UserModel(opened.model, opened.function, num_classes)


def _open_run_model(spec: TargetModelSpec, data: Split, store: str, device: torch.device) -> OpenedModel:
    run = str(spec.run)
    model, selected = open_weights(store, run, data.shape, data.classes, device, spec.checkpoint)
    return OpenedModel(model, selected, function=open_training(store, run).spec.model.function)


def _load_file(model: nn.Module, spec: TargetModelSpec) -> str | None:
    """Load the state dict of the file; a note on how its names were changed, or None."""
    tensors, note = match_state_dict(spec, model.state_dict(), _read_tensors(str(spec.file)))
    model.load_state_dict(tensors)
    return note


def match_state_dict(
    spec: TargetModelSpec, model_state: Mapping[str, Any], file_state: Mapping[str, _T]
) -> tuple[dict[str, _T], str | None]:
    """The tensors of the file under the names of the model, and a note on the prefixes that were removed, or None.

    Only names and shapes are compared: `model_state` may be on the meta device and `file_state` the header of the file.

    Raises:
        UserError: the file holds the weights of another architecture; the message names the first that differ.
    """
    tensors, note = _remove_wrapper_prefixes(file_state, model_state)
    differences = _differences(model_state, tensors)
    if differences:
        what = f"what {spec.function} returns" if spec.function else f"this {spec.name}"
        hint = "" if spec.function else f"; {_normalisation_hint(spec, tensors)}"
        raise UserError(f"{spec.file} is not the state dict of {what}: {differences}{hint}")
    return dict(tensors), note


def _read_tensors(path: str) -> Mapping[str, Tensor]:
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


def _remove_wrapper_prefixes(
    tensors: Mapping[str, _T], model_state: Mapping[str, Any]
) -> tuple[Mapping[str, _T], str | None]:
    """The tensors without the prefixes of wrappers, and a note on the prefixes that were removed, or None.

    DataParallel puts `module.` before all names of a model; torch.compile puts `_orig_mod.` before the names of each
    compiled module. Nothing is removed unless more names agree with those of the model afterwards.
    """
    renamed = {name: value for name, value in tensors.items() if name != _COUNTER}
    prefixes: set[str] = set()
    while renamed and all(name.startswith(("module.", "_orig_mod.")) for name in renamed):
        prefixes |= {name.partition(".")[0] for name in renamed}
        renamed = {name.partition(".")[2]: value for name, value in renamed.items()}
    if any("._orig_mod." in name for name in renamed):
        prefixes.add("_orig_mod")
        renamed = {re.sub(r"\._orig_mod(?=\.)", "", name): value for name, value in renamed.items()}
    if not prefixes or len(model_state.keys() & renamed.keys()) <= len(model_state.keys() & tensors.keys()):
        return tensors, None
    wrappers = " and ".join(f"{prefix}. (of {_WRAPPERS[prefix]})" for prefix in sorted(prefixes))
    return renamed, f"{wrappers} left out of the names of its weights"


def _differences(model_state: Mapping[str, Any], file_state: Mapping[str, Any]) -> str:
    """The names that are missing, unknown or of another shape in a file, a few of each; "" where it fits."""
    differences: dict[str, list[str]] = {
        "missing": [name for name in model_state if name not in file_state],
        "unknown": [name for name in file_state if name not in model_state],
        "of another shape": [],
    }
    for name, value in model_state.items():
        if name in file_state and file_state[name].shape != value.shape:
            message = f"{name} is {list(file_state[name].shape)}, not {list(value.shape)}"
            differences["of another shape"].append(message)
    return "; ".join(f"{len(names)} {what} ({_first_names(names)})" for what, names in differences.items() if names)


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _normalisation_hint(spec: TargetModelSpec, tensors: Mapping[str, Any]) -> str:
    """Whether the file has a normalisation layer, and what to set in the spec where this disagrees with it."""
    if {"normalize.mean", "normalize.std"} <= set(tensors):
        advice = "" if spec.normalize == "data" else ": set model.normalize to data"
        return f"the file has a normalisation inside{advice}"
    advice = ": set model.normalize to none, or add the two" if spec.normalize == "data" else ""
    return f"the file has no normalisation inside (normalize.mean, normalize.std){advice}"


def _digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
