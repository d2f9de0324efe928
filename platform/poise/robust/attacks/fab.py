"""FAB-T, the targeted Fast Adaptive Boundary attack: looks for the nearest point that the model gets wrong.

Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from poise.robust.attacks.checks import check_inputs, require_logits
from poise.robust.attacks.contract import (
    AttackResult,
    at_once,
    attack_mode,
    choose,
    input_gradient,
    require_finite,
    scores,
)
from poise.robust.attacks.hyperplanes import Hyperplanes
from poise.robust.attacks.losses import targeted_margin
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.spec import Norm
from poise.robust.threats import ORDERS, Threat

__all__ = ["Run", "fab"]

_ALPHA_MAX, _OVERSHOOT, _BACKWARD = 0.1, 1.05, 0.9


def fab(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    targets: int | None = 9,
    noise: Source = None,
    batch_size: int | None = None,
) -> AttackResult:
    """Attack for evaluation: an example is fooled if the nearest wrong point that is met lies in the ball.

    Targets are the classes of the highest logits at the image, one run each on the examples that stand. Later restarts
    of a target start at random in the ball of radius eps / 2. Who stands keeps the image as `adversarial`.

    Args:
        model: maps (N, ...) images to (N, K) logits.
        x, y: images (N, ...) in [0, 1]; true labels (N,) int64.
        steps: gradients of one run; each costs two forwards and one backward.
        restarts: runs for each target.
        targets: how many of the K - 1 wrong classes are tried; None is all of them.
        noise: see `noise.Source`.
        batch_size: as for `apgd`.

    Raises:
        ValueError: a count below 1, or a model of one class.
        PoiseError: the gradient of an example was not finite.
    """
    if min(steps, restarts, 1 if targets is None else targets) < 1:
        raise ValueError(f"steps, restarts and targets are at least 1, not {steps}, {restarts} and {targets}")
    y = check_inputs(x, y, threat)
    streams, half = as_noise(noise, x), Threat(threat.norm, threat.eps / 2)
    with attack_mode(model):
        logits = scores(model, x)
        if logits.ndim == 2 and logits.shape[1] > 1:  # one class alone is refused by `_ranked`
            require_logits(logits, y)
        adversarial, correct, ranked = x.clone(), logits.argmax(1) == y, _ranked(logits, y, targets)
        runs = list(product(range(ranked.shape[1]), range(restarts)))
        while runs and len(alive := correct.nonzero().flatten()):
            group = runs[: at_once(len(alive), batch_size)]
            runs, rows = runs[len(group) :], alive.repeat(len(group))
            image, label = x[rows], y[rows]
            starts = [_start(half, x[alive], streams.pick(alive).at(rank), restart) for rank, restart in group]
            target = torch.cat([ranked[alive, rank] for rank, _ in group])
            point, distance = Run(model, threat.norm, steps, rows).closest(image, label, target, torch.cat(starts))
            fooled = distance <= threat.eps
            for found, fell in zip(point.chunk(len(group)), fooled.chunk(len(group)), strict=True):
                first = fell & correct[alive]
                adversarial[alive[first]], correct[alive[first]] = found[first], False
    return AttackResult(adversarial, correct)


@dataclass(frozen=True)
class Run:
    """One run towards one target per example; `rows` (N,): the places of the examples in their batch."""

    model: nn.Module
    norm: Norm
    steps: int
    rows: Tensor

    def closest(self, x: Tensor, y: Tensor, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest point to x that the model gets wrong, of all that are met, and its distance (N,); x, inf if none.

        Each step takes the tangent of f(z) = z_target - z_y at the point and goes beyond its zero, drawn a little
        towards the zero nearest to the image; from a wrong point it then turns back towards the image. Call it in
        `attack_mode`.
        """
        difference, point = partial(targeted_margin, target=target), start
        nearest, distance = x, torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
        finite = torch.full((len(x),), self.steps, device=x.device)
        for step in range(self.steps):
            grad, value, _ = input_gradient(self.model, point, y, difference)
            finite = torch.where(grad.flatten(1).abs().amax(1).isfinite(), finite, finite.clamp(max=step))
            point = _step(x, point, grad, value, self.norm)
            wrong, length = scores(self.model, point).argmax(1) != y, _length((point - x).flatten(1), self.norm)
            nearer = wrong & (length < distance)
            nearest, distance = choose(nearer, point, nearest), torch.where(nearer, length, distance)
            point = choose(wrong, torch.lerp(x, point, _BACKWARD), point)
        require_finite(finite, self.steps, self.rows)
        return nearest, distance


def _start(ball: Threat, x: Tensor, noise: Noise, restart: int) -> Tensor:
    """The image itself, or at a later restart a random point of the ball."""
    if restart == 0:
        return x
    return x + ball.start_from(x, noise.at(restart).uniform(x[0].numel() + 1, x.dtype))


def _ranked(logits: Tensor, y: Tensor, targets: int | None) -> Tensor:
    """The wrong classes by falling logit, (N, targets) at most."""
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError("FAB needs a wrong class to aim at, the model has one class")
    count = classes - 1 if targets is None else min(targets, classes - 1)
    ranked = logits.scatter(1, y.unsqueeze(1), -torch.inf).topk(count, dim=1)
    return torch.where(ranked.values > -torch.inf, ranked.indices, ranked.indices[:, :1])  # no class that is masked


def _step(x: Tensor, point: Tensor, grad: Tensor, value: Tensor, norm: Norm) -> Tensor:
    """From the tangent of f at `point`, `value` + grad . (z - point): beyond its zero, mixed with the image's."""
    image, here, slope = x.flatten(1), point.flatten(1), grad.flatten(1)
    value = value.to(slope.dtype)
    planes = Hyperplanes(slope, norm)
    own = planes.reach(here, -value)
    other = planes.reach(image, torch.linalg.vecdot(slope, here - image) - value)
    near, far = (_length(d, norm).unsqueeze(1) for d in (own, other))
    alpha = (near / (near + far).clamp(min=torch.finfo(near.dtype).tiny)).clamp(max=_ALPHA_MAX)
    mixed = torch.lerp(here + _OVERSHOOT * own, image + _OVERSHOOT * other, alpha)
    return mixed.clamp(0, 1).view_as(x)


def _length(delta: Tensor, norm: Norm) -> Tensor:
    """(N,); torch's own maximum norm takes several times as long on CPUs."""
    if norm == "linf":
        return delta.abs().amax(1)
    length: Tensor = torch.linalg.vector_norm(delta, ord=ORDERS[norm], dim=1)
    return length
