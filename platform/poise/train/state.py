"""The exact state of a training run, and its form on disk: safetensors for tensors, JSON for the rest, no pickle.

Weights that are tied are stored once. Frozen weights are not stored: their SHA-256 is, and has to be that of the frozen
weights which a restarted run comes with, so that a checkpoint of a low-rank tuning has the size of its adapters.
"""

from __future__ import annotations

import hashlib
import json
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

MODEL, OPTIMIZER, TASK, RNG, WINDOW, REST = (
    "model.safetensors",
    "optimizer.safetensors",
    "task.safetensors",
    "rng.safetensors",
    "window.safetensors",
    "state.json",
)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far and the step whose checkpoint holds it."""

    value: float
    step: int


@dataclass
class TrainState:
    """All that a step reads and writes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    task: TaskState
    step: int = 0
    best: Best | None = None

    @cached_property
    def frozen(self) -> str:
        """The SHA-256 of the weights that no step changes."""
        digest = hashlib.sha256()
        for name in _frozen(self.model):
            tensor = self.model.get_parameter(name).detach().cpu().contiguous()
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def save_state(state: TrainState, rngs: list[dict[str, Tensor]], folder: Path) -> None:
    """Write `state` and the generators of every rank into an empty folder."""
    optimizer = state.optimizer.state_dict()
    moments, scalars = _split(optimizer["state"])
    best = None if state.best is None else {"value": state.best.value, "step": state.best.step}
    rest = {"step": state.step, "best": best, "groups": optimizer["param_groups"], "scalars": scalars}
    rest["frozen"] = state.frozen
    save_file(_plain(_stored(state.model)), folder / MODEL)
    save_file(_plain(moments), folder / OPTIMIZER)
    save_file(_plain(state.task), folder / TASK)
    save_file({f"{rank}/{name}": value for rank, rng in enumerate(rngs) for name, value in rng.items()}, folder / RNG)
    (folder / REST).write_text(json.dumps(rest, indent=1))


def save_window(windows: list[dict[str, Tensor]], folder: Path) -> None:
    """Write the metrics of every rank, (steps,) each, that no row has yet; nothing where there are none."""
    if any(windows):
        named = {f"{rank}/{name}": value for rank, window in enumerate(windows) for name, value in window.items()}
        save_file(_plain(named), folder / WINDOW)


def load_window(folder: Path, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
    """What `rank` had in its window; nothing when the checkpoint comes from another number of ranks."""
    if not (folder / WINDOW).is_file():
        return {}
    named = load_file(folder / WINDOW, str(device))
    if len({name.split("/", 1)[0] for name in named}) != world_size:
        return {}
    return {name.split("/", 1)[1]: value for name, value in named.items() if name.startswith(f"{rank}/")}


def load_state(state: TrainState, folder: Path, device: torch.device) -> None:
    """Fill `state` from a folder written by `save_state`, in place."""
    rest = json.loads((folder / REST).read_text())
    if rest["frozen"] != state.frozen:
        raise UserError("the frozen weights are not those that the run was started with: give it its first base model")
    load_weights(state.model, folder, device)
    state.optimizer.load_state_dict(
        {"state": _join(load_file(folder / OPTIMIZER, str(device)), rest["scalars"]), "param_groups": rest["groups"]}
    )
    for parameter, moments in state.optimizer.state.items():  # in the memory layout of their parameter, as they were
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)
    state.task = load_file(folder / TASK, str(device))
    state.step = rest["step"]
    state.best = None if rest["best"] is None else Best(**rest["best"])


def load_weights(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Load the weights of a checkpoint into `model`. Raises UserError when they belong to another architecture."""
    stored, own = load_file(folder / MODEL, str(device)), model.state_dict()
    kept = {name: own[name] for name in _frozen(model)}
    tied = {name: stored[first] for name, first in _tied(own).items() if first in stored}
    try:
        model.load_state_dict({**kept, **tied, **stored})
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"the checkpoint holds another model than the spec describes: {detail}") from None


def capture_rng(device: torch.device) -> dict[str, Tensor]:
    """Every generator that code of a step may draw from, as tensors."""
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
    """Set every generator to what `rank` had; False when the checkpoint comes from fewer ranks than that."""
    states = {
        name.split("/", 1)[1]: value for name, value in load_file(folder / RNG).items() if name.startswith(f"{rank}/")
    }
    if not states:
        return False
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    version, *words = states["python"].tolist()
    next_gauss = states["python_gauss"].item()
    random.setstate((version, tuple(words), None if next_gauss != next_gauss else next_gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    return True


def seed_rng(seed: int, rank: int, step: int = 0) -> None:
    """Seed every generator of this process from the seed of the run, the rank and the step."""
    value = derive_seed(seed, "rank", rank, step)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: everything but frozen weights and further names of tied ones."""
    tensors = model.state_dict()
    left_out = {*_frozen(model), *_tied(tensors)}
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def _frozen(model: nn.Module) -> list[str]:
    """The names, tied ones too, of weights that take no gradient, in a fixed order."""
    named = model.named_parameters(remove_duplicate=False)
    return sorted(name for name, parameter in named if not parameter.requires_grad)


def _tied(tensors: dict[str, Tensor]) -> dict[str, str]:
    """For each further name of a tensor, its first."""
    first: dict[tuple[int, torch.Size], str] = {}
    places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in tensors.items() if tensor.numel()}
    return {name: first[place] for name, place in places.items() if first.setdefault(place, name) != name}


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _split(moments: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    flat = {f"{index}/{name}": value for index, entry in moments.items() for name, value in entry.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _join(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[int, dict[str, Any]]:
    moments: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **scalars}.items():
        index, key = name.split("/", 1)
        moments.setdefault(int(index), {})[key] = value
    return moments
