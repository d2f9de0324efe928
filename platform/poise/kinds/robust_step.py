"""The step of a robust training: the objective, what goes round it, and what follows the optimizer's step.

The state of the task is the states of its parts, each under a prefix: `objective/`, `average/`, `projection/`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from poise.errors import UserError
from poise.kinds.specs.robust import RobustTrainSpec
from poise.robust.attacks import PERTURB, Loss, cross_entropy
from poise.robust.averaging import MoreauEnvelope, WeightAverage
from poise.robust.awp import WeightPerturbation
from poise.robust.manifold import Eigenbasis, Within
from poise.robust.objective_spec import Ramp
from poise.robust.objectives import OBJECTIVES, GradientProjection, Play, initial_state
from poise.robust.spec import Norm, ThreatSpec
from poise.robust.threats import Beside, Threat
from poise.robust.training_spec import Averaging, Ema, Swa
from poise.spec.seeds import derive_seed
from poise.train.task import StepOutput, TaskState, Turn

__all__ = ["RobustStep", "part", "under"]

_Batch = tuple[Tensor, Tensor]


class RobustStep:
    """What a task of robust training does with each batch and after each step of the optimizer."""

    def __init__(
        self, spec: RobustTrainSpec, model: nn.Module, steps_per_epoch: int, basis: Eigenbasis | None = None
    ) -> None:
        """With a `basis`, perturbations stay in the eigenspace of each image's class (eigenspace adversarial training).

        Raises UserError when averaging or the perturbation of weights would begin too late to do anything.
        """
        self._spec, self._model = spec, model
        self._basis = None if basis is None else basis.to(next(model.parameters()))
        total = spec.train.total_steps(steps_per_epoch)
        self._average = None if spec.averaging is None else _average(spec.averaging, steps_per_epoch, total)
        self._fused = spec.compute.fused and _agree([threat for _, threat in spec.threats.items()])
        self._compiled = cast(nn.Module, torch.compile(model)) if spec.compute.compile else None
        self._awp, self._awp_start = None, 0
        if spec.awp is not None:
            self._awp = WeightPerturbation(model, float(spec.awp.gamma))
            self._awp_start = spec.awp.start.in_steps(steps_per_epoch) if spec.awp.start else 0
            _not_too_late("awp.start", self._awp_start, total)
        self._projection = None
        if isinstance(spec.objective, Ramp) and spec.objective.projection is not None:
            self._projection = GradientProjection(model, float(spec.objective.projection), steps_per_epoch)

    def initial(self) -> TaskState:
        """The state before the first step, on the model's device but for what the objective begins with."""
        state = under("objective", initial_state(self._spec.objective, self._spec.threats.keys()))
        if self._average is not None:
            state |= under("average", self._average.initial(self._model))
        if self._projection is not None:
            state |= under("projection", self._projection.initial())
        return state

    def step(self, model: nn.Module, batch: _Batch, state: TaskState, turn: Turn) -> StepOutput:
        """The objective at the adversarial examples of every threat, and the pull of the anchor if there is one."""
        pull = None
        if isinstance(self._average, MoreauEnvelope):  # at w, before the weights are perturbed
            pull = self._average.pull(self._model, part("average", state), turn.step)
        objective = OBJECTIVES[self._spec.objective.name]
        if self._awp is not None and turn.step >= self._awp_start:
            objective = partial(self._awp.objective, objective)
        outcome = objective(model, *batch, self._play(batch[1], part("objective", state), turn))
        after = state | under("objective", outcome.state)
        if pull is None:
            return StepOutput(outcome.loss, outcome.metrics, after)
        return StepOutput(outcome.loss + pull, outcome.metrics | {"pull": pull.detach()}, after)

    def after(self, state: TaskState, step: int) -> TaskState:
        """The state when the optimizer has taken its `step`-th step; averages see the weights as they then stay."""
        if self._awp is not None:
            self._awp.restore()
        if self._projection is not None:
            state = state | under("projection", self._projection(part("projection", state), step))
        if self._average is not None:
            state = state | under("average", self._average.after(self._model, part("average", state), step))
        return state

    def averaged(self, state: TaskState, step: int) -> TaskState | None:
        """The averaged parameters after `step` steps; None without averaging, and before its first move."""
        return part("average", state) if self._average is not None and self._average.moves(step) else None

    def _threat(self, norm: Norm, eps: float, y: Tensor) -> Threat:
        return Threat(norm, eps) if self._basis is None else Within(norm, eps, basis=self._basis, labels=y)

    def _play(self, y: Tensor, state: TaskState, turn: Turn) -> Play:
        threats = self._spec.threats.items()
        attacks: dict[str, _Attack] = {
            norm: _Attack(self._threat(norm, each.eps, y), each, turn, self._compiled) for norm, each in threats
        }
        return Play(
            attacks=attacks,
            options=self._spec.objective,
            state=state,
            step=turn.step,
            epoch=turn.epoch,
            first_in_epoch=turn.first_in_epoch,
            draw=random.Random(derive_seed(self._spec.seed, "draw", turn.step)).random(),
            mean=turn.mean,
            noise=turn.generator,
            together=partial(_together, tuple(attacks.values())) if self._fused else None,
            craft=partial(_timed, turn),
        )


def under(prefix: str, state: Mapping[str, Tensor]) -> TaskState:
    """The state of a part as it stands in that of the task."""
    return {f"{prefix}/{name}": value for name, value in state.items()}


def part(prefix: str, state: Mapping[str, Tensor]) -> TaskState:
    """The state of a part out of that of the task."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def _timed(turn: Turn, attack: Callable[[], Tensor]) -> Tensor:
    with turn.timers("attack"):
        return attack()


@dataclass(frozen=True)
class _Attack:
    """An attack of one step: its noise is that of the step, its time is charged to the attack phase."""

    threat: Threat
    spec: ThreatSpec
    turn: Turn
    compiled: nn.Module | None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy, **options: Any) -> Tensor:
        with self.turn.timers("attack"):
            perturb, bound = PERTURB[self.spec.attack], {**self.spec.options(), **options}
            return perturb(self.compiled or model, x, y, self.threat, loss=loss, noise=self.turn.generator, **bound)


def _agree(threats: Sequence[ThreatSpec]) -> bool:
    """Whether the attacks differ in norm, radius and sparsity alone, so that one batch can hold them all."""
    with_default = all(threat.attack == "pgd" and threat.step_size is None for threat in threats)
    return with_default and len({(each.steps, each.restarts, each.options()["random_start"]) for each in threats}) == 1


def _together(attacks: Sequence[_Attack], model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The points of all attacks, whose images go through the network side by side."""
    count, first = len(attacks), attacks[0]
    beside = replace(first, threat=Beside(parts=tuple(attack.threat for attack in attacks)))
    sparsity = next((each.spec.options()["sparsity"] for each in attacks if each.threat.norm == "l1"), 1)
    points = beside(model, torch.cat([x] * count), torch.cat([y] * count), sparsity=sparsity)
    return points.chunk(count)


def _average(spec: Averaging, steps_per_epoch: int, total: int) -> WeightAverage | MoreauEnvelope:
    start = spec.start.in_steps(steps_per_epoch) if spec.start else 0
    every = spec.every.in_steps(steps_per_epoch)
    _not_too_late("averaging.start", start + every - 1, total)
    if isinstance(spec, Swa):
        return WeightAverage("swa", start, every)
    if isinstance(spec, Ema):
        return WeightAverage("ema", start, every, decay=float(spec.decay), warm_up=spec.warm_up)
    anchor = WeightAverage(spec.rule, start, every, float(spec.decay), spec.warm_up, float(spec.rate))
    return MoreauEnvelope(float(spec.pull), anchor)


def _not_too_late(key: str, last_idle_step: int, total: int) -> None:
    if last_idle_step >= total:
        raise UserError(f"{key}: nothing would happen in a run of {total} steps before it ends: begin earlier")
