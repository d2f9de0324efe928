"""Several threats in one attack or one draw: SAT, MSD and MIX.

Notation and source as in `norms`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from poise.robust.attacks import cross_entropy
from poise.robust.attacks.msd import msd_perturb
from poise.robust.objectives.base import ObjectiveInput, ObjectiveOutput, craft, make_output, unwrap
from poise.robust.objectives.norms import single

__all__ = ["mix", "msd", "sat"]


def sat(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """l_p for one p per batch, each of the P threats with probability 1/P (Madaan et al., 2021)."""
    norms = tuple(inputs.attacks)
    return single(model, x, y, inputs, norms[int(inputs.draw * len(norms))])


def msd(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """Mean cross entropy at the points of multi steepest descent (Maini, Wong and Kolter, 2020).

    There is one perturbation. Each of its steps is the projected steepest step of that norm which leaves the example
    the highest loss. So the perturbation lies in the union of the balls; it starts at the image. See
    `attacks.msd_perturb`.
    """
    threats = {norm: attack.threat for norm, attack in inputs.attacks.items()}
    sizes = None
    if inputs.options.step_sizes:
        sizes = {norm: float(size) for norm, size in inputs.options.step_sizes.items()}
    attack = partial(
        msd_perturb,
        unwrap(model),
        x,
        y,
        threats,
        steps=inputs.options.steps,
        step_sizes=sizes,
        noise=inputs.noise,
    )
    adversarial = inputs.run_attack(attack)
    return _at_point(model, adversarial, y, inputs, "msd")


def mix(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """Mean cross entropy at x + (1/P) sum_p delta_p, delta_p being the perturbation of threat p (the ADT code)."""
    points = torch.stack(craft(model, x, y, inputs))  # (P, N, ...)
    return _at_point(model, points.mean(0), y, inputs, "mix")


def _at_point(model: nn.Module, point: Tensor, y: Tensor, inputs: ObjectiveInput, name: str) -> ObjectiveOutput:
    """One training forward at a point that belongs to no threat alone: the metrics have the objective's name."""
    logits = model(point)  # (N, K)
    losses = cross_entropy(logits, y).unsqueeze(0)  # (1, N)
    correct = (logits.detach().argmax(1) == y).unsqueeze(0)  # (1, N)
    (loss,) = losses.mean(1)
    output = make_output(inputs, loss, losses, correct, (name,), torch.ones_like(loss).view(1))
    metrics = {key: output.metrics[key] for key in (f"loss/{name}", f"robust/{name}")}
    return ObjectiveOutput(loss, metrics, output.state)
