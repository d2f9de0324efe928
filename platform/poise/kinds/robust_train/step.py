"""The step of a robust training: the objective with its attacks, and what follows the optimizer's step.

The state of the task consists of the states of its parts, each under a prefix: `objective/`, `average/`, `after_step/`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from poise.errors import UserError
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.robust.attacks import TRAINING_ATTACKS
from poise.robust.manifold import Eigenbasis, EigenspaceThreat
from poise.robust.objectives import BoundAttack, ObjectiveContext
from poise.robust.objectives.checks import craft_points, first_state
from poise.robust.spec import Norm, Threats
from poise.robust.threats import StackedThreats, Threat
from poise.robust.training.averaging import Average
from poise.robust.training.awp import WeightPerturbation
from poise.robust.training_spec import Averaging
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
        self._average: Average | None = None
        if spec.averaging is not None:
            self._average = _build_average(spec.averaging, steps_per_epoch, total_steps)
        self._fused = spec.compute.fused and _can_fuse(spec.threats)
        self._compiled = cast(nn.Module, torch.compile(model)) if spec.compute.compile else None
        self._awp = WeightPerturbation(model, gamma=0)  # does nothing
        if spec.awp is not None:
            awp_start = spec.awp.start.in_steps(steps_per_epoch) if spec.awp.start else 0
            _check_start("awp.start", awp_start, total_steps)
            self._awp = WeightPerturbation(model, float(spec.awp.gamma), awp_start)
        self._after_step = spec.objective.after_step(model, steps_per_epoch)

    def initial(self) -> TaskState:
        """The state before the first step, on the model's device except for that of the objective."""
        state = add_prefix("objective", first_state(self._spec.objective, self._spec.threats.keys()))
        if self._average is not None:
            state |= add_prefix("average", self._average.initial(self._model))
        if self._after_step is not None:
            state |= add_prefix("after_step", self._after_step.initial())
        return state

    def step(self, model: nn.Module, batch: _Batch, state: TaskState, step_context: StepContext) -> StepOutput:
        """The objective at the adversarial examples of every threat, plus the proximal term of a Moreau envelope.

        `batch`: images x (B, C, H, W) and labels y (B,).
        """
        self._awp.reset()  # the proximal term and the attacks work at w, also after an earlier batch of the step
        proximal_term = None
        if self._average is not None:
            average_state = strip_prefix("average", state)
            proximal_term = self._average.proximal_term(self._model, average_state, step_context.step)
        objective = self._spec.objective
        context = self._objective_context(model, batch, strip_prefix("objective", state), step_context)
        with step_context.timers("attack"):
            points = craft_points(objective, context)
        output = self._awp.loss(objective, points, context)
        next_state = state | add_prefix("objective", output.state)
        if proximal_term is None:
            return StepOutput(output.loss, output.metrics, next_state)
        metrics = output.metrics | {"proximal_term": proximal_term.detach()}
        return StepOutput(output.loss + proximal_term, metrics, next_state)

    def after(self, state: TaskState, step: int) -> TaskState:
        """The state after the `step`-th step of the optimizer.

        Averages use the weights that AWP and what the objective does after a step have left.
        """
        self._awp.restore()
        if self._after_step is not None:
            after_step_state = self._after_step(strip_prefix("after_step", state), step)
            state = state | add_prefix("after_step", after_step_state)
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

    def _objective_context(
        self, model: nn.Module, batch: _Batch, state: TaskState, step_context: StepContext
    ) -> ObjectiveContext:
        x, y = batch
        attacks: dict[str, BoundAttack] = {}
        for norm, threat_spec in self._spec.threats.items():
            attacks[norm] = BoundAttack(
                threat=self._threat(norm, threat_spec.eps, y),
                options=threat_spec.options(),
                attack=TRAINING_ATTACKS[threat_spec.attack],
                noise=step_context.generator,
                compiled=self._compiled,
            )
        return ObjectiveContext(
            model=model,
            x=x,
            y=y,
            attacks=attacks,
            state=state,
            step=step_context.step,
            epoch=step_context.epoch,
            first_in_epoch=step_context.first_in_epoch,
            draw=random.Random(derive_seed(self._spec.seed, "draw", step_context.step)).random(),
            mean=step_context.mean,
            noise=step_context.generator,
            fused=partial(_attack_fused, tuple(attacks.values())) if self._fused else None,
        )


def add_prefix(prefix: str, state: Mapping[str, Tensor]) -> TaskState:
    """The state of a part, with the keys that it has in the state of the task."""
    return {f"{prefix}/{name}": value for name, value in state.items()}


def strip_prefix(prefix: str, state: Mapping[str, Tensor]) -> TaskState:
    """The state of a part, from the state of the task."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def _can_fuse(threats: Threats) -> bool:
    """Whether the attacks differ in norm, radius and sparsity only, so that one batch can hold them all."""
    sections = [threat for _, threat in threats.items()]
    if not all(threat.attack == "pgd" and threat.step_size is None for threat in sections):
        return False
    return len({(threat.steps, threat.restarts, threat.starts_at_random) for threat in sections}) == 1


def _attack_fused(attacks: Sequence[BoundAttack], model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The adversarial points (B, ...) of each attack, computed on one batch of all attacks together."""
    count = len(attacks)
    # Their options are the same, but for a sparsity, which only steepest steps under l1 have.
    options: dict[str, Any] = {}
    for attack in attacks:
        options |= attack.options
    stacked_threats = StackedThreats(parts=tuple(attack.threat for attack in attacks))
    fused_attack = replace(attacks[0], threat=stacked_threats, options=options)
    points = fused_attack(model, torch.cat([x] * count), torch.cat([y] * count))  # (count * B, ...)
    return points.chunk(count)


def _build_average(spec: Averaging, steps_per_epoch: int, total_steps: int) -> Average:
    start = spec.start.in_steps(steps_per_epoch) if spec.start else 0
    every = spec.every.in_steps(steps_per_epoch)
    _check_start("averaging.start", start + every - 1, total_steps)
    return spec.build(start, every)


def _check_start(key: str, last_idle_step: int, total_steps: int) -> None:
    if last_idle_step >= total_steps:
        raise UserError(f"{key}: nothing would happen in a run of {total_steps} steps before it ends: begin earlier")
