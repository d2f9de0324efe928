"""The limits of a language model: the size of its vocabulary and the length of its context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from poise.errors import UserError
from poise.models.examine import context_length

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NO_LIMITS", "ModelLimits", "model_limits"]

_UNLIMITED = 2**31


@dataclass(frozen=True)
class ModelLimits:
    """The number of rows of the token embedding, and the longest sequence in tokens."""

    vocabulary: int = _UNLIMITED
    context: int = _UNLIMITED

    def check_ids(self, tokens: Iterable[int]) -> None:
        """UserError for a token id that has no row in the embedding."""
        largest = max(tokens, default=0)
        if largest >= self.vocabulary:
            raise UserError(
                f"its tokens go up to {largest} and the model has embeddings of {self.vocabulary}: the tokenizer is "
                "not this model's"
            )

    def check_context_length(self, prompts: Iterable[Sequence[int]], tokens: int, key: str = "max_tokens") -> None:
        """UserError for a prompt that is empty, has a token without embedding, or leaves no room for `tokens` more.

        `key` is the setting of a spec that decides how many more, for the message.
        """
        for prompt in prompts:
            if not prompt:
                raise UserError("a prompt has no token; begin it with the model's BOS token")
            self.check_ids(prompt)
            if len(prompt) + tokens > self.context:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens and {tokens} more do not fit into the {self.context} that the "
                    f"model can hold; lower {key}"
                )


NO_LIMITS = ModelLimits()


def model_limits(model: nn.Module) -> ModelLimits:
    """The limits of an opened model of transformers, whose config has the defaults of its class filled in."""
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    return ModelLimits(rows, context_length(config) or _UNLIMITED)
