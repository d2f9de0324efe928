"""What tells that a robustness is not what it seems: overfitting, robust and catastrophic.

Sources: papers/adversarial.md, sections 4 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.robust.attacks import attack_mode, pgd
from poise.robust.noise import Noise
from poise.robust.objectives.fast import gradient_cosines
from poise.robust.threats import Threat

__all__ = ["Probe", "alarm", "probe", "robust_gap"]


@dataclass(frozen=True)
class Probe:
    """A batch looked at: accuracy under FGSM and under PGD, and the mean cosine between input gradients at the images
    and at random points of the ball (NaN where no gradient has a direction)."""

    fgsm: float
    pgd: float
    cosine: float


def probe(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, steps: int, noise: Noise) -> Probe:
    """Attack x (N, ...) in [0, 1] by one step of length eps from the image, and by `steps` steps from a random start.

    A model that overfits catastrophically withstands the one and not the other, and its gradients turn within the ball
    (Wong et al., 2020; Andriushchenko and Flammarion, 2020). The model is left as it was.
    """
    one = pgd(model, x, y, threat, steps=1, step_size=threat.eps, random_start=False, noise=noise)
    many = pgd(model, x, y, threat, steps=steps, noise=noise)
    uniform = noise.at(1).uniform(x[0].numel() + 1, x.dtype)
    with attack_mode(model), torch.enable_grad():
        cosines, angled = gradient_cosines(model, x, x + threat.start_from(x, uniform), y)
    cosine = cosines.detach()[angled].mean().item()
    return Probe(one.correct.double().mean().item(), many.correct.double().mean().item(), cosine)


def alarm(now: Probe, before: float, *, gap: float, fall: float) -> str | None:
    """Why `now` is catastrophic overfitting, or None; `before` is the PGD accuracy of the probe before, or NaN."""
    reasons = []
    if now.fgsm - now.pgd > gap:
        reasons.append(f"accuracy is {now.fgsm:.1%} under FGSM and {now.pgd:.1%} under PGD")
    if not math.isnan(before) and before - now.pgd > fall:
        reasons.append(f"accuracy under PGD fell from {before:.1%} to {now.pgd:.1%}")
    return f"catastrophic overfitting: on a batch of training images {' and '.join(reasons)}" if reasons else None


def robust_gap(train: Mapping[str, float], held_out: Mapping[str, float]) -> dict[str, float]:
    """Training accuracy minus held-out accuracy for each measure: "gap/clean", and "gap/linf" of "robust/linf"."""
    return {f"gap/{name.removeprefix('robust/')}": train[name] - value for name, value in held_out.items()}
