"""The interface of an objective: what it gets for one batch, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks import Loss, cross_entropy
from poise.robust.threats import Threat

__all__ = ["Attack", "Objective", "ObjectiveInput", "ObjectiveOutput", "State", "craft", "make_output", "unwrap"]

State = dict[str, Tensor]
"""What an objective remembers from batch to batch. It belongs in checkpoints, and is the same on every rank."""


class Attack(Protocol):
    """Crafts adversarial examples in `threat`, like x and detached, with its steps and its noise already bound.

    `options` are arguments of `attacks.perturb` that override the bound ones.
    """

    @property
    def threat(self) -> Threat: ...

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy, **options: Any
    ) -> Tensor: ...


def _identity(values: Tensor) -> Tensor:
    return values


def _call(attack: Callable[[], Tensor]) -> Tensor:
    return attack()


@dataclass(frozen=True)
class ObjectiveInput:
    """All that an objective needs beside the model, the images and the labels of one batch.

    Args:
        attacks: by norm, in the order linf, l2, l1.
        options: the section of the spec that names the objective.
        state: from `initial_state` or from the last `ObjectiveOutput`.
        step: number of the optimizer step.
        epoch: number of the epoch that the step belongs to.
        first_in_epoch: whether the step is the first of its epoch.
        draw: uniform in [0, 1), the same on every rank: for choices that a whole batch shares.
        mean: averages a tensor over ranks, so that every rank has the same state.
        noise: draws the noise of this rank's examples.
        fused: runs all of `attacks` in one batch, if that is possible: points like x, in the order of `attacks`.
        run_attack: runs an attack that is none of `attacks`, so that the caller can time it, or replay its result.
    """

    attacks: Mapping[str, Attack]
    options: Any
    state: State = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    first_in_epoch: bool = False
    draw: float = 0.0
    mean: Callable[[Tensor], Tensor] = _identity
    noise: torch.Generator | None = None
    fused: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]] | None = None
    run_attack: Callable[[Callable[[], Tensor]], Tensor] = _call


@dataclass(frozen=True)
class ObjectiveOutput:
    """One batch: the scalar `loss` to step on, detached scalar metrics of this rank, and the state for the next batch.

    Metrics are "loss/<norm>", "robust/<norm>" (training accuracy at its adversarial examples), "robust/union" and
    "weight/<norm>" (the coefficient of the threat in the loss; for `max` the share of examples that it was worst for).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    state: State


Objective = Callable[[nn.Module, Tensor, Tensor, ObjectiveInput], ObjectiveOutput]
"""Called with the model in train mode ((N, ...) to logits (N, K); may be a DistributedDataParallel wrapper), images
(N, ...) in [0, 1], labels (N,) int64, and the `ObjectiveInput`."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel wrapper, or the model itself: what attacks get."""
    inner: nn.Module = getattr(model, "module", model)
    return inner


def craft(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput, **options: Any) -> list[Tensor]:
    """The adversarial examples of every threat, each like x; `options` go to the attacks."""
    inner = unwrap(model)
    if inputs.fused is not None and not options:
        return list(inputs.fused(inner, x, y))
    return [attack(inner, x, y, **options) for attack in inputs.attacks.values()]


def make_output(
    inputs: ObjectiveInput,
    loss: Tensor,
    losses: Tensor,
    correct: Tensor,
    norms: Sequence[str],
    weights: Tensor,
    state: State | None = None,
) -> ObjectiveOutput:
    """The output of a batch: `loss`, the metrics of each norm, and `state` (by default the state before the batch).

    Args:
        losses: (P, N), the losses of N examples under each of the P `norms`.
        correct: bool (P, N), which adversarial examples are classified right.
        weights: (P,), the coefficients of the norms in `loss`.

    Raises:
        PoiseError: a loss is not finite; the message names the example and the step.
    """
    losses = losses.detach()
    _require_finite(losses, norms, inputs.step)
    metrics = {"robust/union": correct.all(0).float().mean()}
    for index, norm in enumerate(norms):
        metrics[f"loss/{norm}"] = losses[index].mean()
        metrics[f"robust/{norm}"] = correct[index].float().mean()
        metrics[f"weight/{norm}"] = weights.detach()[index]
    return ObjectiveOutput(loss, metrics, inputs.state if state is None else state)


def _require_finite(losses: Tensor, norms: Sequence[str], step: int) -> None:
    if not bool(losses.isfinite().all()):
        row, example = losses.isfinite().logical_not().nonzero()[0].tolist()
        raise PoiseError(
            f"the loss under {norms[row]} of example {example} of the batch is {losses[row, example].item()} at step "
            f"{step}: lower train.optimizer.lr, set train.clip_norm or use train.precision fp32"
        )
