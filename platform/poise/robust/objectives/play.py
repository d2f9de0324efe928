"""What an objective gets for one batch, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks import Loss, cross_entropy
from poise.robust.threats import Threat

__all__ = ["Attack", "Objective", "Outcome", "Play", "State", "bare", "outcome", "points_of"]

State = dict[str, Tensor]
"""What an objective remembers from batch to batch; belongs in checkpoints, and is the same on every rank."""


class Attack(Protocol):
    """Crafts adversarial examples in `threat`, like x and detached, with the steps and the noise bound to it.

    `options` are arguments of `attacks.perturb` that go before the bound ones.
    """

    @property
    def threat(self) -> Threat: ...

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy, **options: Any
    ) -> Tensor: ...


def _same(values: Tensor) -> Tensor:
    return values


def _now(attack: Callable[[], Tensor]) -> Tensor:
    return attack()


@dataclass(frozen=True)
class Play:
    """One batch of the game between the attacks and the model.

    Args:
        attacks: by norm, in the order linf, l2, l1.
        options: the section of the spec that names the objective.
        state: from `initial_state` or from the last `Outcome`.
        step: number of the optimizer step.
        epoch: number of the epoch that it belongs to.
        draw: uniform in [0, 1), the same on every rank: for choices that a whole batch shares.
        mean: averages a tensor over ranks, so that every rank has the same state.
        noise: draws the noise of this rank's examples.
        together: all of `attacks` in one batch, if that can be: points like x, in their order.
        craft: runs an attack that is none of `attacks`, so that the caller can time it, or play it again.
    """

    attacks: Mapping[str, Attack]
    options: Any
    state: State = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    first_in_epoch: bool = False
    draw: float = 0.0
    mean: Callable[[Tensor], Tensor] = _same
    noise: torch.Generator | None = None
    together: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]] | None = None
    craft: Callable[[Callable[[], Tensor]], Tensor] = _now


@dataclass(frozen=True)
class Outcome:
    """One batch: the scalar `loss` to step on, detached scalar metrics of this rank, and the state for the next batch.

    Metrics are "loss/<norm>", "robust/<norm>" (training accuracy at its adversarial examples), "robust/union" and
    "weight/<norm>" (the coefficient of the threat in the loss; for `max` the share of examples that it was worst for).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    state: State


Objective = Callable[[nn.Module, Tensor, Tensor, Play], Outcome]
"""Called with the model in train mode ((N, ...) to logits (N, K); may be a DistributedDataParallel wrapper), images
(N, ...) in [0, 1], labels (N,) int64, and the play."""


def bare(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel wrapper, or the model itself: what attacks get."""
    inner: nn.Module = getattr(model, "module", model)
    return inner


def points_of(model: nn.Module, x: Tensor, y: Tensor, play: Play, **options: Any) -> list[Tensor]:
    """The adversarial examples of every threat, like x each; `options` go to the attacks."""
    inner = bare(model)
    if play.together is not None and not options:
        return list(play.together(inner, x, y))
    return [attack(inner, x, y, **options) for attack in play.attacks.values()]


def outcome(
    play: Play,
    loss: Tensor,
    losses: Tensor,
    correct: Tensor,
    norms: Sequence[str],
    weights: Tensor,
    state: State | None = None,
) -> Outcome:
    """The outcome of a batch whose losses and verdicts, (P, N) each, are those of `norms`; the state stays by default.

    Raises PoiseError when a loss is not finite, naming the example and the step.
    """
    _require_finite(losses.detach(), norms, play.step)
    metrics = {"robust/union": correct.all(0).float().mean()}
    for norm, own, right, weight in zip(norms, losses.detach(), correct, weights.detach(), strict=True):
        metrics |= {f"loss/{norm}": own.mean(), f"robust/{norm}": right.float().mean(), f"weight/{norm}": weight}
    return Outcome(loss, metrics, play.state if state is None else state)


def _require_finite(losses: Tensor, norms: Sequence[str], step: int) -> None:
    if not bool(losses.isfinite().all()):
        row, example = losses.isfinite().logical_not().nonzero()[0].tolist()
        raise PoiseError(
            f"the loss under {norms[row]} of example {example} of the batch is {losses[row, example].item()} at step "
            f"{step}: lower train.optimizer.lr, set train.clip_norm or use train.precision fp32"
        )
