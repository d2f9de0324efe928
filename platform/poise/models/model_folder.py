"""The facts of a language model's folder, and the checks that every sampler makes of requests and new weights.

A folder is as `save_pretrained` writes it: config.json, generation_config.json, *.safetensors. Tied weights are stored
once, under the name that the folder has for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from poise.errors import PoiseError, UserError
from poise.models.examine import examine_folder, has_tokenizer
from poise.models.language import open_config, open_tokenizer
from poise.models.limits import NO_LIMITS, ModelLimits
from poise.models.special_tokens import SpecialTokens, read_special_tokens

__all__ = ["ModelFolder", "check_newer", "read_folder"]


@dataclass(frozen=True)
class ModelFolder:
    """The shape of every stored weight by name, and the limits of the model in tokens."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    limits: ModelLimits

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.limits.context

    @cached_property
    def special(self) -> SpecialTokens:
        """The special tokens, by the configs and the tokenizer if there is one."""
        tokenizer = open_tokenizer(self.path) if has_tokenizer(self.path) else None
        return read_special_tokens(self.path, open_config(self.path), tokenizer, self.limits.vocabulary)

    @property
    def stop(self) -> frozenset[int]:
        """The tokens that end a response."""
        return self.special.stop

    def check_context_length(self, prompts: Iterable[Sequence[int]], tokens: int, key: str = "max_tokens") -> None:
        """UserError for an empty prompt, and for one after which `tokens` more do not fit."""
        try:
            self.limits.check_context_length(prompts, tokens, key)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    def validate_state_dict(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` on the CPU under exactly the names of the folder; PoiseError with the differences otherwise.

        A further name of a tensor with the same values, as `state_dict` has for tied weights, is left out.
        """
        stored = [weights[name] for name in self.shapes if name in weights]
        problems = [f"{name} is missing" for name in self.shapes if name not in weights]
        for name, value in weights.items():
            if name not in self.shapes and not any(torch.equal(value, other) for other in stored):
                problems.append(f"{name} is not known")
        for name, shape in self.shapes.items():
            if name in weights and weights[name].shape != shape:
                problems.append(f"{name} is {list(weights[name].shape)}, not {list(shape)}")
        if problems:
            raise PoiseError(f"these are not the weights of {self.path}: {_first_three(problems)}; nothing was changed")
        return {name: weights[name].detach().cpu() for name in self.shapes}


def read_folder(path: Path) -> ModelFolder:
    """The facts of a folder, with or without a tokenizer; UserError when it holds no language model."""
    facts = examine_folder(path, tokenizer=False)
    context = (facts.context or NO_LIMITS.context) - 1  # vLLM generates one token after a sequence to score it
    limits = ModelLimits(facts.vocabulary or NO_LIMITS.vocabulary, context)
    return ModelFolder(path, facts.shapes, limits)


def check_newer(version: int, than: int) -> None:
    """PoiseError unless `version` is newer than `than`, the version of the weights that are served."""
    if version <= than:
        raise PoiseError(f"weights of version {version} came to a sampler that has version {than} already")


def _first_three(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more
