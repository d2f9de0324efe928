"""The interface of an objective of adversarial training, and what it gets and returns for one batch.

An objective is one class in one file: its options are pydantic fields, and two methods are what it does with a batch.
`craft` finds the adversarial points; `loss` is the loss at these points. All points are crafted before the first
training forward, so that every threat meets the same model. In a notebook, on plain tensors:

    >>> from poise.robust.objectives import OBJECTIVES, BoundAttack, ObjectiveContext
    >>> from poise.robust.threats import Threat
    >>> objective = OBJECTIVES["trades"](beta=6)
    >>> attack = BoundAttack(Threat("linf", 8 / 255), {"steps": 10})
    >>> context = ObjectiveContext(model, x, y, attacks={"linf": attack})
    >>> points = objective.craft(context)            # {"linf": points like x}
    >>> output = objective.loss(points, context)
    >>> output.loss.backward()

Whoever calls the two methods may do something between them, or call `loss` again at other weights: timers, adversarial
weight perturbation and attacks that are computed in one batch all work from outside (`robust.training.awp`,
`kinds.robust_train.step`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from poise.robust.attacks import Loss, cross_entropy, perturb
from poise.robust.noise import Source
from poise.robust.spec import Threats
from poise.robust.threats import Threat
from poise.spec.registry import MethodSection

__all__ = [
    "AfterStep",
    "Attack",
    "BoundAttack",
    "Objective",
    "ObjectiveContext",
    "ObjectiveOutput",
    "Points",
    "State",
    "check_same_norms",
    "craft_all",
    "craft_one",
    "gradients_of_one_draw",
    "require_one_threat",
    "unwrap",
]

State = dict[str, Tensor]
"""What an objective remembers from batch to batch. It belongs in checkpoints, and is the same on every rank."""

Points = Mapping[str, Tensor]
"""The adversarial points of a batch, each like x and detached: by the norm of their threat, or by another name."""


class Attack(Protocol):
    """Crafts adversarial examples in `threat`, like x and detached, with its steps and its noise already bound.

    `options` are arguments of `attacks.perturb` that override the bound ones.
    """

    @property
    def threat(self) -> Threat: ...

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy, **options: Any
    ) -> Tensor: ...


@dataclass(frozen=True)
class BoundAttack:
    """An attack of training with its threat, its options and its noise bound.

    Attributes:
        options: keyword arguments of `attack`, such as {"steps": 10}.
        attack: `attacks.perturb` or `attacks.apgd_perturb`.
        noise: see `noise.Source`.
        compiled: called in place of the model, with the same weights.
    """

    threat: Threat
    options: Mapping[str, Any]
    attack: Callable[..., Tensor] = perturb
    noise: Source = None
    compiled: nn.Module | None = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy, **options: Any) -> Tensor:
        """Adversarial examples like x (N, ...) for labels y (N,); `options` override the bound ones."""
        all_options = {**self.options, **options}
        return self.attack(self.compiled or model, x, y, self.threat, loss=loss, noise=self.noise, **all_options)


def _identity(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class ObjectiveContext:
    """One batch, and what an objective may use to compute its loss.

    Attributes:
        model: in train mode, maps (N, ...) to logits (N, K); may be a DistributedDataParallel wrapper. Training
            forwards go through it, and attacks get the module inside (`unwrap`).
        x: images (N, ...) in [0, 1]. They belong to the caller: a model that may change its input gets a copy.
        y: labels (N,) int64.
        attacks: by norm, in the order linf, l2, l1.
        state: from `Objective.initial_state` or from the last `ObjectiveOutput`.
        step: number of the optimizer step.
        epoch: number of the epoch that the step belongs to.
        first_in_epoch: whether the step is the first of its epoch.
        draw: uniform in [0, 1), the same on every rank: for choices that a whole batch shares.
        mean: averages a tensor over ranks, so that every rank has the same state.
        noise: draws the noise of this rank's examples.
        fused: an optimisation of the caller: runs all of `attacks` in one batch, and returns points like x, in the
            order of `attacks`. None where that is not possible.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    attacks: Mapping[str, Attack]
    state: State = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    first_in_epoch: bool = False
    draw: float = 0.0
    mean: Callable[[Tensor], Tensor] = _identity
    noise: torch.Generator | None = None
    fused: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class ObjectiveOutput:
    """One batch: the scalar `loss` to step on, detached scalar metrics of this rank, and the state for the next batch.

    Metrics are "loss/<norm>", "robust/<norm>" (training accuracy at its adversarial examples), "robust/union" and
    "weight/<norm>" (the coefficient of the threat in the loss; for `max` the share of examples that it was worst for).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    state: State


class AfterStep(Protocol):
    """What an objective does with the model after every step of the optimizer, with a state of its own."""

    def initial(self) -> State:
        """The state before the first step, on the model's device."""
        ...

    def __call__(self, state: State, step: int) -> State:
        """The state after the optimizer's `step`-th step; may write into the model, never into `state`."""
        ...


class Objective(MethodSection, ABC):
    """An objective of adversarial training: a section of a spec, with the method that it stands for.

    A subclass has one field for each option, and in Poise a field `name`, a literal with its name as the default. It
    must implement `loss`; all other methods have defaults.
    """

    def check(self, threats: Threats) -> None:
        """Raise `ValueError` when the objective cannot be trained on these threats."""

    def gradients_per_batch(self, threats: Threats) -> int:
        """Input gradients that the attacks take per training batch, on average over the batches of a run.

        By default the sum over threats of steps times restarts.
        """
        return sum(threat.steps * threat.restarts for _, threat in threats.items())

    def losses_per_batch(self, threats: Threats) -> int:
        """Training forwards of one batch, without those of its attacks. By default one for each threat."""
        return len(threats)

    def steps_per_batch(self, threats: Threats) -> int:
        """Consecutive optimizer steps on each batch. By default one."""
        return 1

    @property
    def training_metrics(self) -> Sequence[str]:
        """The names of further metrics that `loss` reports, by which a sweep may choose. By default none.

        Those of each norm, see `ObjectiveOutput`, are not among them.
        """
        return ()

    @property
    def copies_of_model(self) -> int:
        """How many copies of the model the state of `after_step` holds, for the size of a checkpoint."""
        return 0

    def initial_state(self, norms: Sequence[str]) -> State:
        """The state before the first batch, for threats in these norms. By default empty.

        Keys that `loss` adds to the state are committed and resumed too.
        """
        return {}

    def after_step(self, model: nn.Module, steps_per_epoch: int) -> AfterStep | None:
        """What happens to `model` after every step of the optimizer. By default nothing: None."""
        return None

    def craft(self, context: ObjectiveContext) -> Points:
        """The adversarial points of the batch, and all else that `loss` needs of them; by default of every threat."""
        return craft_all(context)

    @abstractmethod
    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The loss of the batch at `points`, the metrics and the next state.

        It may be called several times with the same points, at other weights. `context.state` is not written to.
        """


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel wrapper, or the model itself: what attacks get."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def craft_all(context: ObjectiveContext) -> dict[str, Tensor]:
    """The adversarial examples of every threat, by norm, each like x."""
    inner = unwrap(context.model)
    if context.fused is not None:
        return dict(zip(context.attacks, context.fused(inner, context.x, context.y), strict=True))
    return {norm: attack(inner, context.x, context.y) for norm, attack in context.attacks.items()}


def craft_one(context: ObjectiveContext, norm: str, **options: Any) -> dict[str, Tensor]:
    """The adversarial examples of the threat `norm` alone, by its norm; `options` go to the attack."""
    attack = context.attacks[norm]
    return {norm: attack(unwrap(context.model), context.x, context.y, **options)}


def require_one_threat(name: str, threats: Threats) -> None:
    """Raise `ValueError` unless the objective of this name is given exactly one threat."""
    if len(threats) != 1:
        norms = ", ".join(threats.keys())
        raise ValueError(
            f"objective `{name}` trains on exactly one threat and {len(threats)} are given ({norms}): "
            "keep one, or use `avg`, `max` or `adt`"
        )


def gradients_of_one_draw(threats: Threats) -> int:
    """Input gradients per batch where one threat is drawn for each batch: the mean over threats."""
    gradients = [threat.steps * threat.restarts for _, threat in threats.items()]
    return round(sum(gradients) / len(gradients))


def check_same_norms(what: str, norms: Sequence[str], threats: Threats) -> None:
    """Raise `ValueError` unless values that are given by norm are given for exactly the norms of the threats."""
    if set(norms) != set(threats.keys()):
        raise ValueError(
            f"{what} are given for {', '.join(norms)} and threats for {', '.join(threats.keys())}: name the same norms"
        )
