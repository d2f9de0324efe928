"""Several threats in one attack or one draw: SAT, MSD and MIX.

Notation and source as in `norms`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from poise.robust.attacks import cross_entropy
from poise.robust.attacks.msd import msd_perturb
from poise.robust.objectives.norms import single
from poise.robust.objectives.play import Outcome, Play, bare, outcome, points_of

__all__ = ["mix", "msd", "sat"]


def sat(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """l_p for one p per batch, each of the P threats with probability 1/P (Madaan et al., 2021)."""
    return single(model, x, y, play, tuple(play.attacks)[int(play.draw * len(play.attacks))])


def msd(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """Mean cross entropy at the points of multi steepest descent (Maini, Wong and Kolter, 2020).

    One perturbation, every step of which is the steepest one, projected, in whichever norm leaves the example the
    highest loss: it lies in the union of the balls and starts at the image. See `attacks.msd_perturb`.
    """
    threats = {norm: attack.threat for norm, attack in play.attacks.items()}
    sizes = play.options.step_sizes and {norm: float(size) for norm, size in play.options.step_sizes.items()}
    steps = play.options.steps
    point = play.craft(
        partial(msd_perturb, bare(model), x, y, threats, steps=steps, step_sizes=sizes, noise=play.noise)
    )
    return _at_point(model, point, y, play, "msd")


def mix(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """Mean cross entropy at x + (1/P) sum_p delta_p, delta_p being the perturbation of threat p (the ADT code)."""
    points = points_of(model, x, y, play)
    return _at_point(model, torch.stack(points).mean(0), y, play, "mix")


def _at_point(model: nn.Module, point: Tensor, y: Tensor, play: Play, name: str) -> Outcome:
    """One training forward at a point that belongs to no threat alone: the metrics bear the objective's name."""
    logits = model(point)
    losses, correct = cross_entropy(logits, y).unsqueeze(0), (logits.detach().argmax(1) == y).unsqueeze(0)
    (loss,) = losses.mean(1)
    out = outcome(play, loss, losses, correct, (name,), torch.ones_like(loss).view(1))
    return Outcome(loss, {f"{of}/{name}": out.metrics[f"{of}/{name}"] for of in ("loss", "robust")}, out.state)
