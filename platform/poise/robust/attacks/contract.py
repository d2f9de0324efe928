"""What every attack here promises, and the pieces that they share.

The contract (papers/adversarial.md, section 1): losses are summed over the batch (a mean would only shrink gradients
towards underflow); gradients are taken for the input alone and parameters are frozen meanwhile, so that no weight
gradient is computed or accumulated; BN and dropout are in eval mode; training flags, `requires_grad`, BN buffers and
the global random stream are afterwards what they were before.

Attack the bare model: under DistributedDataParallel pass `ddp.module`, since every rank attacks its own examples.
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
    "at_once",
    "attack_mode",
    "choose",
    "column",
    "input_gradient",
    "lowest",
    "require_finite",
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
    """What an attack found: `adversarial` like x, and `correct` bool (N,), True where the model withstood all of it."""

    adversarial: Tensor
    correct: Tensor


@contextmanager
def attack_mode(model: nn.Module, bn_mode: BNMode = "eval") -> Iterator[None]:
    """Eval mode and frozen parameters inside; flags, `requires_grad` and buffers restored exactly at the end.

    With bn_mode "train", BN layers are lent out without their running statistics: in eval mode they then normalise by
    the batch and have nothing to update.
    """
    flags = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lent = [m for m in model.modules() if isinstance(m, _BatchNorm)] if bn_mode == "train" else []
    statistics = [(m, m.running_mean, m.running_var) for m in lent]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        for norm in lent:
            norm.running_mean = norm.running_var = None
        with narrow_gradients(model):
            yield
    finally:
        for norm, mean, var in statistics:
            norm.running_mean, norm.running_var = mean, var
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in flags:
            module.training = training


def input_gradient(model: nn.Module, point: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one backward to the input: (gradient like point, losses (N,), logits (N, K)), all detached.

    Raises UserError for a model that has no gradient for its input. The model gets a copy, which it may change.
    """
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point.clone())
        losses = loss(logits, y)
        if not losses.requires_grad:
            raise UserError(NO_GRADIENT)
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

    `rows` (N,): the places of these examples in the batch, where only some of it is attacked. The one place in an
    attack that waits for the device.
    """
    if not bool((finite == steps).all()):
        index = int(finite.argmin())
        example, step = index if rows is None else int(rows[index]), int(finite[index])
        raise PoiseError(
            f"attack: the loss gradient of example {example} of the batch is not finite at step {step}: "
            "the model has diverged, or its precision is too low for this attack (use bf16 or fp32, not fp16)"
        )


def warn_unmoved(unmoved: Tensor) -> None:
    """UserWarning if the loss of some examples had a gradient of exactly zero at every step; `unmoved` bool (N,)."""
    if count := int(unmoved.sum()):
        warnings.warn(
            f"{count} of {len(unmoved)} examples withstood an attack that could not move: the loss that it climbs has "
            "a gradient of exactly zero at every point tried. They may not be robust: climb another loss or use square",
            stacklevel=3,
        )


def column(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) in the shape (N, 1, ...) that multiplies or selects images `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def choose(where: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` (N, ...) for the examples that `where`, bool (N,), has; `other` for the rest. Both are finite.

    Weights of 0 and 1 choose exactly, and four times faster on CPUs than a mask does.
    """
    return torch.lerp(other, one, column(where, other).to(other.dtype))


def lowest(x: Tensor) -> Tensor:
    """A loss (N,) below that of any point, in the type of the losses of images x (N, ...)."""
    return torch.full((len(x),), -torch.inf, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def at_once(examples: int, batch_size: int | None) -> int:
    """How many runs over so many examples (> 0) share a batch, at least one; None is one at a time."""
    return max((batch_size or 0) // examples, 1)
