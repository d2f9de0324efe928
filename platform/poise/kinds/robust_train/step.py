"""The step of a robust training: the objective with its attacks, and what follows the optimizer's step.

The state of the task consists of the states of its parts, each under a prefix: `objective/`, `average/`, `projection/`.
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
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.robust.attacks import TRAINING_ATTACKS, Loss, cross_entropy
from poise.robust.manifold import Eigenbasis, EigenspaceThreat
from poise.robust.objective_spec import Ramp
from poise.robust.objectives import OBJECTIVES, GradientProjection, ObjectiveInput, initial_state
from poise.robust.spec import Norm, ThreatSpec
from poise.robust.threats import StackedThreats, Threat
from poise.robust.training.averaging import MoreauEnvelope, WeightAverage
from poise.robust.training.awp import WeightPerturbation
from poise.robust.training_spec import Averaging, Ema, Swa
from poise.spec.seeds import derive_seed
from poise.train.task import StepContext, StepOutput, TaskState

__all__ = ["RobustStep", "add_prefix", "strip_prefix"]

_Batch = tuple[Tensor, Tensor]


class RobustStep:
    """The functions that the training loop calls with each batch and after each step of the optimizer."""

    def __init__(
        self, spec: RobustTrainSpec, model: nn.Module, steps_per_epoch: int, basis: Eigenbasis | None = None
    ) -> None:
        """With a `basis`, perturbations stay in the eigenspace of each image's class (eigenspace adversarial training).

        Raises:
            UserError: averaging or the perturbation of weights would begin after the last step.
        """
        self._spec = spec
        self._model = model
        self._basis = None if basis is None else basis.to(next(model.parameters()))
        total_steps = spec.train.total_steps(steps_per_epoch)
        self._average = None
        if spec.averaging is not None:
            self._average = _build_average(spec.averaging, steps_per_epoch, total_steps)
        self._fused = spec.compute.fused and _can_fuse([threat for _, threat in spec.threats.items()])
        self._compiled = cast(nn.Module, torch.compile(model)) if spec.compute.compile else None
        self._awp = None
        self._awp_start = 0
        if spec.awp is not None:
            self._awp = WeightPerturbation(model, float(spec.awp.gamma))
            self._awp_start = spec.awp.start.in_steps(steps_per_epoch) if spec.awp.start else 0
            _check_start("awp.start", self._awp_start, total_steps)
        self._projection = None
        if isinstance(spec.objective, Ramp) and spec.objective.projection is not None:
            self._projection = GradientProjection(model, float(spec.objective.projection), steps_per_epoch)

    def initial(self) -> TaskState:
        """The state before the first step, on the model's device except for that of the objective."""
        state = add_prefix("objective", initial_state(self._spec.objective, self._spec.threats.keys()))
        if self._average is not None:
            state |= add_prefix("average", self._average.initial(self._model))
        if self._projection is not None:
            state |= add_prefix("projection", self._projection.initial())
        return state

    def step(self, model: nn.Module, batch: _Batch, state: TaskState, step_context: StepContext) -> StepOutput:
        """The objective at the adversarial examples of every threat, plus the proximal term of a Moreau envelope.

        `batch`: images x (B, C, H, W) and labels y (B,).
        """
        x, y = batch
        proximal_term = None
        if isinstance(self._average, MoreauEnvelope):  # at the weights w, before AWP perturbs them
            average_state = strip_prefix("average", state)
            proximal_term = self._average.proximal_term(self._model, average_state, step_context.step)
        objective = OBJECTIVES[self._spec.objective.name]
        if self._awp is not None and step_context.step >= self._awp_start:
            objective = partial(self._awp.objective, objective)
        objective_input = self._objective_input(y, strip_prefix("objective", state), step_context)
        output = objective(model, x, y, objective_input)
        next_state = state | add_prefix("objective", output.state)
        if proximal_term is None:
            return StepOutput(output.loss, output.metrics, next_state)
        metrics = output.metrics | {"pull": proximal_term.detach()}
        return StepOutput(output.loss + proximal_term, metrics, next_state)

    def after(self, state: TaskState, step: int) -> TaskState:
        """The state after the `step`-th step of the optimizer. Averages use the weights after AWP and projection."""
        if self._awp is not None:
            self._awp.restore()
        if self._projection is not None:
            projection_state = self._projection(strip_prefix("projection", state), step)
            state = state | add_prefix("projection", projection_state)
        if self._average is not None:
            average_state = self._average.after(self._model, strip_prefix("average", state), step)
            state = state | add_prefix("average", average_state)
        return state

    def averaged(self, state: TaskState, step: int) -> TaskState | None:
        """The averaged parameters after `step` steps; None without averaging, and before its first update."""
        if self._average is None or not self._average.moves(step):
            return None
        return strip_prefix("average", state)

    def _threat(self, norm: Norm, eps: float, y: Tensor) -> Threat:
        if self._basis is None:
            return Threat(norm, eps)
        return EigenspaceThreat(norm, eps, basis=self._basis, labels=y)

    def _objective_input(self, y: Tensor, state: TaskState, step_context: StepContext) -> ObjectiveInput:
        attacks: dict[str, _Attack] = {}
        for norm, threat_spec in self._spec.threats.items():
            threat = self._threat(norm, threat_spec.eps, y)
            attacks[norm] = _Attack(threat, threat_spec, step_context, self._compiled)
        return ObjectiveInput(
            attacks=attacks,
            options=self._spec.objective,
            state=state,
            step=step_context.step,
            epoch=step_context.epoch,
            first_in_epoch=step_context.first_in_epoch,
            draw=random.Random(derive_seed(self._spec.seed, "draw", step_context.step)).random(),
            mean=step_context.mean,
            noise=step_context.generator,
            fused=partial(_attack_fused, tuple(attacks.values())) if self._fused else None,
            run_attack=partial(_timed, step_context),
        )


def add_prefix(prefix: str, state: Mapping[str, Tensor]) -> TaskState:
    """The state of a part, with the keys that it has in the state of the task."""
    return {f"{prefix}/{name}": value for name, value in state.items()}


def strip_prefix(prefix: str, state: Mapping[str, Tensor]) -> TaskState:
    """The state of a part, from the state of the task."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def _timed(step_context: StepContext, attack: Callable[[], Tensor]) -> Tensor:
    """Run an attack and add its time to the attack phase."""
    with step_context.timers("attack"):
        return attack()


@dataclass(frozen=True)
class _Attack:
    """The attack of one threat in one step. Its noise is that of the step; its time is added to the attack phase."""

    threat: Threat
    spec: ThreatSpec
    step_context: StepContext
    compiled: nn.Module | None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy, **options: Any) -> Tensor:
        with self.step_context.timers("attack"):
            attack = TRAINING_ATTACKS[self.spec.attack]
            all_options = {**self.spec.options(), **options}
            noise = self.step_context.generator
            return attack(self.compiled or model, x, y, self.threat, loss=loss, noise=noise, **all_options)


def _can_fuse(threats: Sequence[ThreatSpec]) -> bool:
    """Whether the attacks differ in norm, radius and sparsity only, so that one batch can hold them all."""
    if not all(threat.attack == "pgd" and threat.step_size is None for threat in threats):
        return False
    return len({(threat.steps, threat.restarts, threat.options()["random_start"]) for threat in threats}) == 1


def _attack_fused(attacks: Sequence[_Attack], model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The adversarial points (B, ...) of each attack, computed on one batch of all attacks together."""
    count = len(attacks)
    stacked_threats = StackedThreats(parts=tuple(attack.threat for attack in attacks))
    fused_attack = replace(attacks[0], threat=stacked_threats)
    # Only steepest steps under l1 have a sparsity.
    sparsity = next((attack.spec.options()["sparsity"] for attack in attacks if attack.threat.norm == "l1"), 1)
    points = fused_attack(model, torch.cat([x] * count), torch.cat([y] * count), sparsity=sparsity)  # (count * B, ...)
    return points.chunk(count)


def _build_average(spec: Averaging, steps_per_epoch: int, total_steps: int) -> WeightAverage | MoreauEnvelope:
    start = spec.start.in_steps(steps_per_epoch) if spec.start else 0
    every = spec.every.in_steps(steps_per_epoch)
    _check_start("averaging.start", start + every - 1, total_steps)
    if isinstance(spec, Swa):
        return WeightAverage("swa", start, every)
    if isinstance(spec, Ema):
        return WeightAverage("ema", start, every, decay=float(spec.decay), warm_up=spec.warm_up)
    anchor = WeightAverage(spec.rule, start, every, float(spec.decay), spec.warm_up, float(spec.rate))
    return MoreauEnvelope(float(spec.pull), anchor)


def _check_start(key: str, last_idle_step: int, total_steps: int) -> None:
    if last_idle_step >= total_steps:
        raise UserError(f"{key}: nothing would happen in a run of {total_steps} steps before it ends: begin earlier")
