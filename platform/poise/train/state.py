"""The exact state of a training run and its files: safetensors for tensors, JSON for the rest, no pickle.

Tied weights are stored once. Of frozen weights only the SHA-256 is stored, so that a checkpoint of a LoRA tuning has
the size of its adapters; a restarted run must bring frozen weights with the same SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poise.errors import UserError
from poise.spec.seeds import derive_seed
from poise.train.task import TaskState

__all__ = [
    "Best",
    "TrainState",
    "capture_rng",
    "load_state",
    "load_weights",
    "load_window",
    "restore_rng",
    "save_state",
    "save_window",
    "seed_rng",
]

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TASK = "task.safetensors"
RNG = "rng.safetensors"
WINDOW = "window.safetensors"
REST = "state.json"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far and the step whose checkpoint holds it."""

    value: float
    step: int


@dataclass
class TrainState:
    """The state that a step reads and writes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    task: TaskState
    step: int = 0
    best: Best | None = None

    @cached_property
    def frozen(self) -> str:
        """The SHA-256 of the names and values of all frozen weights."""
        digest = hashlib.sha256()
        for name in _frozen_names(self.model):
            tensor = self.model.get_parameter(name).detach().cpu().contiguous()
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def save_state(state: TrainState, rngs: list[dict[str, Tensor]], folder: Path) -> None:
    """Write `state` and the random states of every rank into an empty folder."""
    optimizer = state.optimizer.state_dict()
    moments, scalars = _flatten_moments(optimizer["state"])
    rest = {
        "step": state.step,
        "best": None if state.best is None else {"value": state.best.value, "step": state.best.step},
        "groups": optimizer["param_groups"],
        "scalars": scalars,
        "frozen": state.frozen,
    }
    save_file(_contiguous(_trained_tensors(state.model)), folder / MODEL)
    save_file(_contiguous(moments), folder / OPTIMIZER)
    save_file(_contiguous(state.task), folder / TASK)
    save_file(_merge_ranks(rngs), folder / RNG)
    (folder / REST).write_text(json.dumps(rest, indent=1))


def save_window(windows: list[dict[str, Tensor]], folder: Path) -> None:
    """Write the metrics of every rank, each (steps,), that are in no row yet; no file where there are none."""
    if any(windows):
        save_file(_contiguous(_merge_ranks(windows)), folder / WINDOW)


def load_window(folder: Path, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
    """The window that `rank` saved; {} when the checkpoint was written by another number of ranks."""
    if not (folder / WINDOW).is_file():
        return {}
    tensors = load_file(folder / WINDOW, str(device))
    if len({name.split("/", 1)[0] for name in tensors}) != world_size:
        return {}
    return _of_rank(tensors, rank)


def load_state(state: TrainState, folder: Path, device: torch.device) -> None:
    """Fill `state` in place from a folder written by `save_state`.

    Raises:
        UserError: the frozen weights differ, or the checkpoint belongs to another architecture.
    """
    rest = json.loads((folder / REST).read_text())
    if rest["frozen"] != state.frozen:
        raise UserError("the frozen weights are not those that the run was started with: give it its first base model")
    load_weights(state.model, folder, device)
    optimizer_state = _nest_moments(load_file(folder / OPTIMIZER, str(device)), rest["scalars"])
    state.optimizer.load_state_dict({"state": optimizer_state, "param_groups": rest["groups"]})
    # the optimizer creates moments in the memory layout of their parameter; files have them contiguous
    for parameter, moments in state.optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)
    state.task = load_file(folder / TASK, str(device))
    state.step = rest["step"]
    state.best = None if rest["best"] is None else Best(**rest["best"])


def load_weights(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Load the weights of a checkpoint into `model`; UserError when they belong to another architecture."""
    stored = load_file(folder / MODEL, str(device))
    current = model.state_dict()
    # the file lacks frozen weights and further names of tied ones, and load_state_dict needs every name
    frozen = {name: current[name] for name in _frozen_names(model)}
    tied = {name: stored[first] for name, first in _tied_names(current).items() if first in stored}
    try:
        model.load_state_dict({**frozen, **tied, **stored})
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"the checkpoint holds another model than the spec describes: {detail}") from None


def capture_rng(device: torch.device) -> dict[str, Tensor]:
    """The states of all random generators that a step may use (torch, numpy, Python, CUDA), as tensors."""
    # numpy and Python keep the second of two normal draws for the next call
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if next_gauss is None else next_gauss, dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(folder: Path, rank: int, device: torch.device) -> bool:
    """Set all random generators to the states that `rank` saved; False when the checkpoint has no such rank."""
    states = _of_rank(load_file(folder / RNG), rank)
    if not states:
        return False
    *keys, position, has_gauss = states["numpy"].tolist()
    gauss = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, *words = states["python"].tolist()
    next_gauss = states["python_gauss"].item()
    random.setstate((version, tuple(words), None if math.isnan(next_gauss) else next_gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    return True


def seed_rng(seed: int, rank: int, step: int = 0) -> None:
    """Seed all random generators of this process from the seed of the run, the rank and the step."""
    value = derive_seed(seed, "rank", rank, step)
    random.seed(value)
    np.random.seed(value % 2**32)  # numpy takes 32 bits
    torch.manual_seed(value)


def _trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that a checkpoint stores: all but frozen weights and further names of tied ones."""
    tensors = model.state_dict()
    omitted = {*_frozen_names(model), *_tied_names(tensors)}
    return {name: tensor for name, tensor in tensors.items() if name not in omitted}


def _frozen_names(model: nn.Module) -> list[str]:
    """The sorted names of weights without gradient, including all names of tied ones."""
    parameters = model.named_parameters(remove_duplicate=False)
    return sorted(name for name, parameter in parameters if not parameter.requires_grad)


def _tied_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """For every tensor with several names, each further name mapped to the first."""
    first_names: dict[tuple[int, torch.Size], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not tensor.numel():  # empty tensors may share an address without being tied
            continue
        first = first_names.setdefault((tensor.data_ptr(), tensor.shape), name)
        if first != name:
            tied[name] = first
    return tied


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _merge_ranks(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all ranks under the names `rank/name`."""
    return {f"{rank}/{name}": value for rank, tensors in enumerate(ranks) for name, value in tensors.items()}


def _of_rank(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of one rank from what `_merge_ranks` returned; {} for a rank that is not there."""
    prefix = f"{rank}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _flatten_moments(moments: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer by `parameter/name`, as tensors and as other values."""
    flat = {f"{index}/{name}": value for index, entry in moments.items() for name, value in entry.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    scalars = {name: value for name, value in flat.items() if name not in tensors}
    return tensors, scalars


def _nest_moments(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The inverse of `_flatten_moments`."""
    moments: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **scalars}.items():
        index, key = name.split("/", 1)
        moments.setdefault(int(index), {})[key] = value
    return moments
