"""The guarantees of every attack here, and the functions that attacks share.

Guarantees:
- Losses are summed over the batch; a mean would only shrink gradients towards underflow.
- Gradients are taken for the input alone, and parameters are frozen meanwhile, so that no weight gradient is computed
  or accumulated.
- BN and dropout are in eval mode.
- Training flags, `requires_grad`, BN buffers and the global random stream are the same after the attack as before.

Attacks take the module itself: under DistributedDataParallel pass `ddp.module`, since every rank attacks its own
examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poise.errors import PoiseError, UserError
from poise.robust.attacks.losses import Loss
from poise.robust.attacks.narrow import narrow_gradients

__all__ = [
    "NO_GRADIENT",
    "AttackResult",
    "BNMode",
    "attack_mode",
    "choose",
    "column",
    "input_gradient",
    "lowest",
    "require_finite",
    "runs_per_batch",
    "scores",
    "warn_unmoved",
]

BNMode = Literal["eval", "train"]
NO_GRADIENT = (
    "the model has no gradient for its input (it detaches, rounds, or computes under no_grad): only the square attack, "
    "which needs none, can search its robustness"
)


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack: `adversarial` like x, and `correct` bool (N,), True where the attack failed."""

    adversarial: Tensor
    correct: Tensor


@contextmanager
def attack_mode(model: nn.Module, bn_mode: BNMode = "eval") -> Iterator[None]:
    """Eval mode and frozen parameters inside; flags, `requires_grad` and buffers restored exactly at the end.

    With bn_mode "train", the running statistics of BN layers are taken away meanwhile: in eval mode the layers then
    normalise by the batch, and there is nothing that they could update.
    """
    flags = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)] if bn_mode == "train" else []
    statistics = [(norm, norm.running_mean, norm.running_var) for norm in norms]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        for norm in norms:
            norm.running_mean = None
            norm.running_var = None
        with narrow_gradients(model):
            yield
    finally:
        for norm, mean, var in statistics:
            norm.running_mean = mean
            norm.running_var = var
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in flags:
            module.training = training


def input_gradient(model: nn.Module, point: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one backward to the input: (gradient like point, losses (N,), logits (N, K)), all detached.

    Raises UserError for a model that has no gradient for its input. The model gets a copy of `point`, which it may
    change.
    """
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point.clone())
        losses = loss(logits, y)
        if not losses.requires_grad:
            raise UserError(NO_GRADIENT)
        # allow_unused: a model that detaches its input gives None here instead of an error of torch
        (gradient,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
    if gradient is None:
        raise UserError(NO_GRADIENT)
    return gradient, losses.detach(), logits.detach()


@torch.no_grad()
def scores(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, K) without a graph. The model gets a copy of x, which it may change."""
    logits: Tensor = model(x.clone())
    return logits


def require_finite(finite: Tensor, steps: int, rows: Tensor | None = None) -> None:
    """Raise PoiseError unless every entry of `finite` (N,), the steps before the first bad gradient, is `steps`.

    `rows` (N,): the places of these examples in the batch, if they are only a part of it. An attack calls this once, at
    its end, because it synchronises with the device.
    """
    if not bool((finite == steps).all()):
        index = int(finite.argmin())
        example = index if rows is None else int(rows[index])
        step = int(finite[index])
        raise PoiseError(
            f"attack: the loss gradient of example {example} of the batch is not finite at step {step}: "
            "the model has diverged, or its precision is too low for this attack (use bf16 or fp32, not fp16)"
        )


def warn_unmoved(unmoved: Tensor) -> None:
    """UserWarning if the loss of some examples had a gradient of exactly zero at every step; `unmoved` bool (N,)."""
    if count := int(unmoved.sum()):
        warnings.warn(
            f"{count} of {len(unmoved)} examples withstood an attack that could not move: its loss has "
            "a gradient of exactly zero at every point tried. They may not be robust: use another loss, or square",
            stacklevel=3,
        )


def column(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) in the shape (N, 1, ...), which broadcasts against images `like` (N, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def choose(where: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` (N, ...) for the examples where `where`, bool (N,), is True; `other` for the rest. Both are finite.

    Interpolation with weights of 0 and 1 is exact, and four times faster on CPUs than `torch.where`.
    """
    return torch.lerp(other, one, column(where, other).to(other.dtype))


def lowest(x: Tensor) -> Tensor:
    """-inf (N,), a loss below that of any point, in the dtype of the losses of images x (N, ...)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.full((len(x),), -torch.inf, device=x.device, dtype=dtype)


def runs_per_batch(examples: int, batch_size: int | None) -> int:
    """The number of runs over `examples` > 0 examples that share one batch: at least 1, and 1 without a batch_size."""
    return max((batch_size or 0) // examples, 1)
