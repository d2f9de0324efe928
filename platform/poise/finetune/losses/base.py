"""The base class of losses of supervised fine-tuning, and the choice of supervised tokens that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from poise.method_output import describe, require_loss, require_metrics
from poise.spec.registry import MethodSection
from poise.user_code import MethodOutputError, explain_method

__all__ = [
    "IGNORE_INDEX",
    "FinetuneLoss",
    "at_least_fp32",
    "compute_loss",
    "label_log_probs",
    "num_tokens",
    "prepare_loss",
    "supervised",
]

IGNORE_INDEX = -100
"""The label of a token that is not supervised."""


class FinetuneLoss(MethodSection, ABC):
    """Base of the losses: a section `loss` of a spec, whose fields are the options of the loss.

    Attributes:
        per_token: whether the loss and its metrics are sums of what each token has by itself, whatever the others are.
            If so, they are computed for a part of the tokens at a time, from logits (N, V) and labels (N,), and the
            logits of a whole batch are never in memory. False unless a class says so.
    """

    per_token: ClassVar[bool] = False

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """The sum of the losses of all supervised tokens, divided by `normalizer` (default: their number); a scalar.

        Args:
            logits: (..., V), of any floating dtype.
            labels: (...), aligned with the position that predicts them; IGNORE_INDEX where a token is not supervised.
                Where no token is, the loss is a zero with a gradient.
            normalizer: in training, the supervised tokens of the whole optimizer step, so that micro-batches add up.
                A loss that ignores it is wrong without an error as soon as there are several batches or workers.
        """

    def prepare(self, logits: Iterable[Tensor]) -> FinetuneLoss:
        """The loss with what it measures on the model before the first step; by default the loss as it is.

        `logits`: those of the initial model, (M, V) in fp32, for every token of 100 examples, prompts included. The
        examples are held-out ones, or training examples where none is held out. The logits are computed while they are
        read. A run that is started again measures the same.
        """
        return self

    @property
    def training_metrics(self) -> Sequence[str]:
        """The names of the metrics that `metrics` reports, by which a sweep may choose. By default none."""
        return ()

    def metrics(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> dict[str, Tensor]:
        """Scalar tensors to report for each step beside the loss, by name; by default none.

        The arguments are those of `loss`; it is called without gradient. A metric is a sum over supervised tokens
        divided by `normalizer`, so that micro-batches add up.
        """
        return {}

    def describe(self) -> str:
        """The loss and its options for tables; by default its name."""
        return self.name


def prepare_loss(loss: FinetuneLoss, logits: Iterable[Tensor]) -> FinetuneLoss:
    """`loss.prepare(logits)`, with a check. UserError where it returns no loss."""
    with explain_method(loss, "prepare"):
        prepared = loss.prepare(logits)
        if not isinstance(prepared, FinetuneLoss):
            raise MethodOutputError(f"{loss.name}.prepare returned {describe(prepared)}: it must return a FinetuneLoss")
    return prepared


def compute_loss(
    loss: FinetuneLoss, logits: Tensor, labels: Tensor, normalizer: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, and the further metrics of its class: the calls in training, with a check.

    Raises:
        UserError: the loss is not a scalar with a gradient, or the metrics are not scalars.
    """
    with explain_method(loss, "loss"):
        value = loss.loss(logits, labels, normalizer=normalizer)
        require_loss(f"{loss.name}.loss: what it returned", value, ())
    with explain_method(loss, "metrics"), torch.no_grad():
        metrics = loss.metrics(logits, labels, normalizer=normalizer)
        require_metrics(f"{loss.name}.metrics", metrics)
    return value, metrics


def supervised(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The N supervised tokens: logits (N, V) in at least fp32, and labels (N,)."""
    is_supervised = labels != IGNORE_INDEX
    return logits[is_supervised].to(at_least_fp32(logits)), labels[is_supervised]


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) (N,) of the labels (N,) under logits (N, V)."""
    return -nn.functional.cross_entropy(logits, labels, reduction="none")


def at_least_fp32(tensor: Tensor) -> torch.dtype:
    """The dtype of the tensor, or fp32 if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def num_tokens(labels: Tensor, normalizer: float | None) -> float:
    """The divisor of a sum over the supervised tokens with `labels` (N,): `normalizer` or N, which counts as 1 if 0."""
    return max(1, len(labels)) if normalizer is None else normalizer
