"""The hidden states that the head of a language model gets, and what the head does with them.

A causal language model of transformers returns logits of all positions. Here it runs with its head on no position, and
the input of the head is returned, so that a loss can apply the head to a part of the tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poise.finetune.losses.fused import LinearHead

__all__ = ["HeadNotCalledError", "HiddenStates", "linear_head"]

_TOLERANCE = 1e-3
"""Largest difference between the logits of the model and those of its head, relative to the largest logit. Another
scale or softcap differs by more; another order of the additions by less."""


class HeadNotCalledError(Exception):
    """The forward pass of a model did not call its output layer with one tensor."""


class HiddenStates:
    """Runs a model up to its head: `states(model, input_ids=...)` returns hidden states (B, T, d).

    The head is called with no position, inside the forward pass of the model, so that wrappers such as
    DistributedDataParallel work as ever. `model` may be such a wrapper of the model that this was made for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._input: Tensor | None = None
        self._active = False
        layer = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(layer, nn.Module):
            layer.register_forward_pre_hook(self._take)

    def __call__(self, model: nn.Module, **inputs: Any) -> Tensor:
        """Hidden states (B, T, d). HeadNotCalledError where the model computes its logits in another way."""
        self._active = True
        try:
            model(**inputs)
            hidden = self._input
        finally:
            self._active = False
            self._input = None
        if hidden is None:
            raise HeadNotCalledError
        return hidden

    def _take(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if not self._active or len(inputs) != 1:
            return None
        self._input = inputs[0]
        return (self._input[:, :0],)


@torch.no_grad()
def linear_head(model: nn.Module, sequences: Sequence[Sequence[int]], states: HiddenStates) -> LinearHead | None:
    """The head of the model, where its logits are a linear function of `states`, up to a scale and a softcap.

    What the model does is compared with what its config says, on `sequences` of tokens. None for a head that does
    something else, or that is wrapped, as by an adapter.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    if type(layer) is not nn.Linear:
        return None
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(text_config, "final_logit_softcapping", None)
    scale = float(getattr(text_config, "logit_scale", None) or 1.0)
    scale /= float(getattr(text_config, "logits_scaling", None) or 1.0)
    head = LinearHead(layer.weight, layer.bias, scale, None if softcap is None else float(softcap))
    training = model.training
    model.eval()
    try:
        return head if all(_is_head_of(head, model, sequence, states) for sequence in sequences) else None
    except HeadNotCalledError:
        return None
    finally:
        model.train(training)


def _is_head_of(head: LinearHead, model: nn.Module, sequence: Sequence[int], states: HiddenStates) -> bool:
    ids = torch.tensor([list(sequence)], device=head.weight.device)  # (1, T)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    computed = head.logits(states(model, input_ids=ids, use_cache=False)).float()
    return bool((logits - computed).abs().max() <= _TOLERANCE * logits.abs().max())
