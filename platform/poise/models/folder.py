"""What a folder of a language model says of itself, and what every sampler of it checks before it obeys.

A folder is what `save_pretrained` leaves: config.json, generation_config.json, *.safetensors. Tied weights are stored
once, under the name that the folder has for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import PoiseError, UserError
from poise.models.examine import examine_folder, read_json

__all__ = ["ModelFolder", "check_newer", "read_folder"]


@dataclass(frozen=True)
class ModelFolder:
    """The shape of every stored weight by name, the tokens that end a response, the longest sequence."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    stop: frozenset[int]
    context: int

    def check_room(self, prompts: Iterable[Sequence[int]], tokens: int) -> None:
        """UserError for an empty prompt, and for one after which `tokens` more do not fit."""
        for prompt in prompts:
            if not prompt:
                raise UserError(f"{self.path}: a prompt has no token; begin it with the model's BOS token")
            if len(prompt) + tokens > self.context:
                raise UserError(
                    f"{self.path}: a prompt of {len(prompt)} tokens and {tokens} more do not fit into the "
                    f"{self.context} that the model can hold; lower max_tokens"
                )

    def checked(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` on the CPU under exactly the names of the folder; PoiseError that names what does not agree.

        A second name of a tensor that is there already, as `state_dict` gives for tied weights, is left out.
        """
        known = [weights[name] for name in self.shapes if name in weights]
        surplus = [
            name
            for name, value in weights.items()
            if name not in self.shapes and not any(torch.equal(value, other) for other in known)
        ]
        complaints = [
            *(f"{name} is missing" for name in self.shapes if name not in weights),
            *(f"{name} is not known" for name in surplus),
            *(
                f"{name} is {list(weights[name].shape)}, not {list(shape)}"
                for name, shape in self.shapes.items()
                if name in weights and weights[name].shape != shape
            ),
        ]
        if complaints:
            raise PoiseError(f"these are not the weights of {self.path}: {_listed(complaints)}; nothing was changed")
        return {name: weights[name].detach().cpu() for name in self.shapes}


def read_folder(path: Path) -> ModelFolder:
    """The facts of a folder, with or without a tokenizer; UserError when it is not one of a language model."""
    facts = examine_folder(path, tokenizer=False)
    context = (facts.context or 2**31) - 1  # vLLM scores a sequence by asking for one token more
    return ModelFolder(path, facts.shapes, _stop(path, facts.config), context)


def check_newer(version: int, than: int) -> None:
    """PoiseError unless `version` is newer than the weights that are served."""
    if version <= than:
        raise PoiseError(f"weights of version {version} came to a sampler that has version {than} already")


def _stop(path: Path, config: Mapping[str, Any]) -> frozenset[int]:
    generation = path / "generation_config.json"
    known = read_json(generation) if generation.is_file() else {}
    stop = known.get("eos_token_id", config.get("eos_token_id"))
    return frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])


def _listed(complaints: Sequence[str]) -> str:
    more = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
    return ", ".join(complaints[:3]) + more
