"""Monitors of robustness that is not what it seems: robust overfitting and catastrophic overfitting.

Sources of the latter: Wong et al., 2020; Andriushchenko and Flammarion, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.robust.attacks import attack_mode, pgd
from poise.robust.noise import Noise
from poise.robust.objectives.one_step import gradient_cosines
from poise.robust.threats import Threat

__all__ = ["Probe", "alarm", "probe", "robust_gap"]


@dataclass(frozen=True)
class Probe:
    """Accuracy of one batch under FGSM and under PGD, and the mean cosine between input gradients.

    The cosine is between the gradient at the image and that at a random point of the ball; NaN where no gradient has a
    direction.
    """

    fgsm: float
    pgd: float
    cosine: float


def probe(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, steps: int, noise: Noise) -> Probe:
    """Attack x (N, ...) in [0, 1] by one step of length eps from the image, and by `steps` steps from a random start.

    A model that overfits catastrophically withstands the first attack and not the second, and its gradients turn within
    the ball (Wong et al., 2020; Andriushchenko and Flammarion, 2020). The model is not changed.
    """
    one_step = pgd(model, x, y, threat, steps=1, step_size=threat.eps, random_start=False, noise=noise)
    many_steps = pgd(model, x, y, threat, steps=steps, noise=noise)
    uniform = noise.fold_in(1).uniform(x[0].numel() + 1, x.dtype)
    with attack_mode(model), torch.enable_grad():
        cosines, has_angle = gradient_cosines(model, x, x + threat.random_start_from(x, uniform), y)
    return Probe(
        fgsm=one_step.correct.double().mean().item(),
        pgd=many_steps.correct.double().mean().item(),
        cosine=cosines.detach()[has_angle].mean().item(),
    )


def alarm(now: Probe, before: float, *, gap: float, max_drop: float) -> str | None:
    """Why `now` is catastrophic overfitting, or None.

    Args:
        before: the PGD accuracy of the previous probe, or NaN.
        gap: alarm when FGSM accuracy exceeds PGD accuracy by more.
        max_drop: alarm when PGD accuracy is lower than `before` by more.
    """
    reasons = []
    if now.fgsm - now.pgd > gap:
        reasons.append(f"accuracy is {now.fgsm:.1%} under FGSM and {now.pgd:.1%} under PGD")
    if not math.isnan(before) and before - now.pgd > max_drop:
        reasons.append(f"accuracy under PGD fell from {before:.1%} to {now.pgd:.1%}")
    if not reasons:
        return None
    return f"catastrophic overfitting: on a batch of training images {' and '.join(reasons)}"


def robust_gap(train: Mapping[str, float], held_out: Mapping[str, float]) -> dict[str, float]:
    """Training accuracy minus held-out accuracy for each measure: "gap/clean", and "gap/linf" of "robust/linf"."""
    return {f"gap/{name.removeprefix('robust/')}": train[name] - value for name, value in held_out.items()}
