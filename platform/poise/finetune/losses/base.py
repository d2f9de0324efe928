"""The base class of losses of supervised fine-tuning, and the choice of supervised tokens that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from poise.spec.registry import MethodSection

__all__ = ["IGNORE_INDEX", "FinetuneLoss", "at_least_fp32", "num_tokens", "supervised"]

IGNORE_INDEX = -100
"""The label of a token that is not supervised."""


class FinetuneLoss(MethodSection, ABC):
    """Base of the losses: a section `loss` of a spec, whose fields are the options of the loss."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """The sum of the losses of all supervised tokens, divided by `normalizer` (default: their number); a scalar.

        Args:
            logits: (..., V), of any floating dtype.
            labels: (...), aligned with the position that predicts them; IGNORE_INDEX where a token is not supervised.
                Where no token is, the loss is a zero with a gradient.
            normalizer: in training, the supervised tokens of the whole optimizer step, so that micro-batches add up.
        """

    def describe(self) -> str:
        """The loss and its options for tables; by default its name."""
        return self.name


def supervised(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The N supervised tokens: logits (N, V) in at least fp32, and labels (N,)."""
    is_supervised = labels != IGNORE_INDEX
    return logits[is_supervised].to(at_least_fp32(logits)), labels[is_supervised]


def at_least_fp32(tensor: Tensor) -> torch.dtype:
    """The dtype of the tensor, or fp32 if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def num_tokens(labels: Tensor, normalizer: float | None) -> float:
    """The divisor of a sum over the supervised tokens with `labels` (N,): `normalizer` or N, which counts as 1 if 0."""
    return max(1, len(labels)) if normalizer is None else normalizer
