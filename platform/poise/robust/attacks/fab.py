"""FAB-T, the targeted Fast Adaptive Boundary attack: searches the nearest point that the model gets wrong.

Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from poise.robust.attacks.base import (
    AttackResult,
    attack_mode,
    choose,
    input_gradient,
    require_finite,
    runs_per_batch,
    scores,
)
from poise.robust.attacks.fab_projection import Hyperplanes
from poise.robust.attacks.losses import targeted_margin
from poise.robust.attacks.sanity_checks import check_inputs, require_logits
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.spec import DEFAULT_TARGETS, Norm
from poise.robust.threats import ORDERS, Threat

__all__ = ["Run", "fab"]

# the constants of the paper
_ALPHA_MAX = 0.1
_OVERSHOOT = 1.05
_BACKWARD = 0.9


def fab(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    targets: int | None = DEFAULT_TARGETS,
    noise: Source = None,
    batch_size: int | None = None,
) -> AttackResult:
    """Attack for evaluation: an example is fooled if the nearest wrong point that was visited lies in the ball.

    Targets are the classes of the highest logits at the image. Each has one run, on the examples that are not fooled
    yet. Later restarts of a target start at random in the ball of radius eps / 2. For an example that is never fooled,
    `adversarial` is the image.

    Args:
        model: maps (N, ...) images to (N, K) logits.
        x, y: images (N, ...) in [0, 1]; true labels (N,) int64.
        steps: gradients of one run; each costs two forwards and one backward.
        restarts: runs for each target.
        targets: number of wrong classes that are tried, at most K - 1; None is all of them.
        noise: see `noise.Source`.
        batch_size: as for `apgd`.

    Raises:
        ValueError: a count below 1, or a model of one class.
        PoiseError: the gradient of an example was not finite.
    """
    if min(steps, restarts, 1 if targets is None else targets) < 1:
        raise ValueError(f"steps, restarts and targets are at least 1, not {steps}, {restarts} and {targets}")
    y = check_inputs(x, y, threat)
    streams = as_noise(noise, x)
    half_ball = Threat(threat.norm, threat.eps / 2)
    with attack_mode(model):
        logits = scores(model, x)
        if logits.ndim == 2 and logits.shape[1] > 1:  # a model of one class is refused by `_ranked_targets`
            require_logits(logits, y)
        adversarial = x.clone()
        correct = logits.argmax(1) == y
        ranked = _ranked_targets(logits, y, targets)  # (N, T)
        runs = list(product(range(ranked.shape[1]), range(restarts)))  # (rank of the target, restart)
        while runs and len(alive := correct.nonzero().flatten()):
            # as many runs as fit share one batch: the examples that are alive, once per run
            group = runs[: runs_per_batch(len(alive), batch_size)]
            runs = runs[len(group) :]
            rows = alive.repeat(len(group))
            starts = []
            for rank, restart in group:
                starts.append(_start(half_ball, x[alive], streams.select(alive).fold_in(rank), restart))
            target = torch.cat([ranked[alive, rank] for rank, _ in group])
            run = Run(model, threat.norm, steps, rows)
            nearest, distance = run.closest(x[rows], y[rows], target, torch.cat(starts))
            in_ball = distance <= threat.eps
            for point, fooled in zip(nearest.chunk(len(group)), in_ball.chunk(len(group)), strict=True):
                first = fooled & correct[alive]  # the first run of the group that fools an example counts
                adversarial[alive[first]] = point[first]
                correct[alive[first]] = False
    return AttackResult(adversarial, correct)


@dataclass(frozen=True)
class Run:
    """One run towards one target per example; `rows` (N,): the places of the examples in their batch."""

    model: nn.Module
    norm: Norm
    steps: int
    rows: Tensor

    def closest(self, x: Tensor, y: Tensor, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest point to x that the model gets wrong, of all that are visited, and its distance (N,).

        Where no visited point is wrong they are x and infinity. Each step linearises f(z) = z_target - z_y at the
        point and goes slightly beyond the zero of the linearisation, mixed with the zero that is nearest to the image.
        From a wrong point it then goes part of the way back to the image. Call it in `attack_mode`.
        """
        difference = partial(targeted_margin, target=target)
        point = start
        nearest = x
        distance = torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
        finite = torch.full(
            (len(x),), self.steps, device=x.device
        )  # steps before the first gradient that is not finite
        for step in range(self.steps):
            grad, value, _ = input_gradient(self.model, point, y, difference)
            is_finite = grad.flatten(1).abs().amax(1).isfinite()
            finite = torch.where(is_finite, finite, finite.clamp(max=step))
            point = _step(x, point, grad, value, self.norm)
            wrong = scores(self.model, point).argmax(1) != y
            length = _length((point - x).flatten(1), self.norm)
            nearer = wrong & (length < distance)
            nearest = choose(nearer, point, nearest)
            distance = torch.where(nearer, length, distance)
            point = choose(wrong, torch.lerp(x, point, _BACKWARD), point)
        require_finite(finite, self.steps, self.rows)
        return nearest, distance


def _start(ball: Threat, x: Tensor, noise: Noise, restart: int) -> Tensor:
    """The image itself, or at a later restart a random point of the ball."""
    if restart == 0:
        return x
    uniform = noise.fold_in(restart).uniform(x[0].numel() + 1, x.dtype)
    return x + ball.random_start_from(x, uniform)


def _ranked_targets(logits: Tensor, y: Tensor, targets: int | None) -> Tensor:
    """The wrong classes by falling logit, (N, targets) at most."""
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError("FAB needs a wrong class as its target, and the model has one class")
    count = classes - 1 if targets is None else min(targets, classes - 1)
    ranked = logits.scatter(1, y.unsqueeze(1), -torch.inf).topk(count, dim=1)
    # a masked class (logit -inf) is no target: the best class takes its place
    return torch.where(ranked.values > -torch.inf, ranked.indices, ranked.indices[:, :1])


def _step(x: Tensor, point: Tensor, grad: Tensor, value: Tensor, norm: Norm) -> Tensor:
    """One step with the linearisation of f at `point`: value + grad . (z - point).

    It mixes the projection of the point and that of the image onto the zero of the linearisation, both overshot.
    """
    image = x.flatten(1)  # (N, d)
    current = point.flatten(1)
    slope = grad.flatten(1)
    value = value.to(slope.dtype)
    planes = Hyperplanes(slope, norm)
    from_point = planes.reach(current, -value)
    from_image = planes.reach(image, torch.linalg.vecdot(slope, current - image) - value)
    length_from_point = _length(from_point, norm).unsqueeze(1)  # (N, 1)
    length_from_image = _length(from_image, norm).unsqueeze(1)
    total = (length_from_point + length_from_image).clamp(min=torch.finfo(length_from_point.dtype).tiny)
    alpha = (length_from_point / total).clamp(max=_ALPHA_MAX)  # the weight of the image's projection
    mixed = torch.lerp(current + _OVERSHOOT * from_point, image + _OVERSHOOT * from_image, alpha)
    return mixed.clamp(0, 1).view_as(x)


def _length(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of each row, (N,); torch's own maximum norm takes several times as long on CPUs."""
    if norm == "linf":
        return delta.abs().amax(1)
    length: Tensor = torch.linalg.vector_norm(delta, ord=ORDERS[norm], dim=1)
    return length
