"""Projected gradient ascent on a loss of the model, for any threat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from poise.robust.attacks.checks import check_inputs, require_logits
from poise.robust.attacks.contract import (
    AttackResult,
    BNMode,
    attack_mode,
    column,
    input_gradient,
    require_finite,
    scores,
    warn_unmoved,
)
from poise.robust.attacks.losses import Loss, cross_entropy, without_underflow
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.spec import Sparsity
from poise.robust.threats import Threat

__all__ = ["FirstFooling", "decaying_steps", "perturb", "pgd", "training_step"]


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    sparsity: Sparsity = (5, 20),
    loss: Loss = cross_entropy,
    noise: Source = None,
    bn_mode: BNMode = "eval",
) -> AttackResult:
    """Attack for evaluation: an example is correct only if the model withstands every point that was tried.

    The image itself counts as the first point, then every iterate of every run; an example leaves at the end of the
    run that fools the model. `adversarial` holds the first fooling point, or the last point tried if there is none.

    Args:
        model: maps (N, ...) images to (N, K) logits.
        x, y: images (N, ...) in [0, 1]; true labels (N,) int64.
        steps: gradients of one run.
        step_size: length of every step in the threat's norm; None: steps that shrink, see `decaying_steps`.
        restarts: runs; those after the first start at random whatever `random_start` says.
        sparsity: for l1, coordinates per step: a count, or a range that each example draws from at each step.
        loss: what is climbed, see `attacks.losses`; for the cross entropy, its log odds, which do not underflow.
        noise: see `noise.Source`.
        bn_mode: "train" lets BN use the statistics of the attacked batch (its buffers still stay untouched).

    Warns where the loss of an example that stands had a gradient of zero throughout.

    Raises:
        ValueError: images, labels or a radius that make no sense, see `checks.check_inputs`.
        PoiseError: the model has no gradient, or the loss gradient of an example was not finite.
    """
    y = check_inputs(x, y, threat)
    sizes = decaying_steps(threat.eps, steps) if step_size is None else (step_size,) * steps
    ascent, streams = _Ascent(threat, sizes, sparsity, without_underflow(loss)), as_noise(noise, x)
    with attack_mode(model, bn_mode):
        logits = scores(model, x)
        require_logits(logits, y)
        adversarial, correct = x.clone(), logits.argmax(1) == y
        unmoved = correct.clone()
        for run in range(restarts):
            alive = correct.nonzero().flatten()
            if len(alive) == 0:
                break
            among = replace(ascent, threat=threat.pick(alive))
            start = among.start(x[alive], streams.pick(alive).at(run), random=random_start or run > 0)
            watch = FirstFooling(x[alive], y[alive])
            last, blind = among.climb(model, x[alive], y[alive], start, watch)
            unmoved[alive] &= blind
            watch(last, scores(model, last))
            adversarial[alive], correct[alive] = torch.where(column(watch.fooled, x), watch.point, last), ~watch.fooled
    warn_unmoved(unmoved & correct)
    return AttackResult(adversarial, correct)


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    spread: float | None = None,
    sparsity: Sparsity = (5, 20),
    loss: Loss = cross_entropy,
    noise: Source = None,
    bn_mode: BNMode = "eval",
) -> Tensor:
    """Attack for training: the last iterate, like x, detached, at `steps` gradients and no forward beyond them.

    Arguments and errors as for `pgd`, but a `step_size` of None is `training_step`. With `spread`, every run starts at
    the image plus spread * N(0, I), cut to the threat, whatever `random_start` says. With restarts > 1 each example
    keeps the run of highest final loss, which costs two forwards per further run.
    """
    y = check_inputs(x, y, threat)
    size = training_step(threat.eps, steps) if step_size is None else step_size
    ascent, streams = _Ascent(threat, (size,) * steps, sparsity, without_underflow(loss)), as_noise(noise, x)
    with attack_mode(model, bn_mode):
        best, _ = ascent.climb(model, x, y, ascent.start(x, streams, random=random_start, spread=spread))
        for run in range(1, restarts):
            other, _ = ascent.climb(model, x, y, ascent.start(x, streams.at(run), random=True, spread=spread))
            before, after = (ascent.loss(scores(model, point), y) for point in (best, other))
            best = torch.where(column(after > before, x), other, best)
    return best


def decaying_steps(eps: float, steps: int) -> tuple[float, ...]:
    """The default step lengths of an evaluation: eps * (1 + cos(pi * t / steps)) / 2 for t = 0, ..., steps - 1.

    The first step crosses the ball and the last ones refine, so that more steps only find more. Equal steps of
    2.5 * eps / steps cannot leave the region of their start when there are many. Cosine-annealed steps are those of
    Probability Margin Attack (arXiv 2411.15210), here from eps instead of 2 * eps.
    """
    return tuple(eps * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps))


def training_step(eps: float, steps: int) -> float:
    """The default step length of training: 2.5 * eps / steps (Madry et al., 2018), at most eps."""
    return min(2.5 * eps / steps, eps)


class FirstFooling:
    """Keeps, of the points it is shown, the first of each example that the model gets wrong."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.y, self.point, self.fooled = y, x, torch.zeros_like(y, dtype=torch.bool)

    def __call__(self, point: Tensor, logits: Tensor) -> None:
        wrong = (logits.argmax(1) != self.y) & ~self.fooled
        self.point = torch.where(column(wrong, point), point, self.point)
        self.fooled = self.fooled | wrong


@dataclass(frozen=True)
class _Start:
    delta: Tensor
    counts: Tensor  # (N, steps): coordinates that each l1 step moves


@dataclass(frozen=True)
class _Ascent:
    """One run of steepest ascent with projection."""

    threat: Threat
    sizes: Sequence[float]  # length of each step
    sparsity: Sparsity
    loss: Loss

    def start(self, x: Tensor, noise: Noise, *, random: bool, spread: float | None = None) -> _Start:
        """Everything that one run draws, before it begins, so that its loop never waits for the device."""
        width = x[0].numel() + 1
        if spread is not None:
            delta = self.threat.project(x, spread * noise.normal(width - 1, x.dtype).view_as(x))
        else:
            delta = self.threat.start_from(x, noise.uniform(width, x.dtype)) if random else torch.zeros_like(x)
        low, high = (self.sparsity, self.sparsity) if isinstance(self.sparsity, int) else self.sparsity
        return _Start(delta, noise.at(-1).integers(low, high + 1, len(self.sizes)))

    def climb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        start: _Start,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last iterate, and whose gradient was zero at every step, bool (N,).

        `watch` sees every earlier iterate together with its logits, which cost nothing extra.
        """
        blind = torch.ones_like(y, dtype=torch.bool)
        steps = len(self.sizes)
        delta, finite = start.delta, torch.full((len(x),), steps, device=x.device)
        for step, size in enumerate(self.sizes):
            point = x + delta
            grad, _, logits = input_gradient(model, point, y, self.loss)
            largest = grad.flatten(1).abs().amax(1)
            finite = torch.where(largest.isfinite(), finite, finite.clamp(max=step))
            blind = blind & (largest == 0)
            if watch is not None:
                watch(point, logits)
            ascent = self.threat.steepest(grad, size, at=point, sparsity=start.counts[:, step])
            delta = self.threat.project(x, delta + ascent)
        require_finite(finite, steps)
        return x + delta, blind
