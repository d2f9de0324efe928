"""PGD: projected gradient ascent on a loss of the model, for any threat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from poise.robust.attacks.base import (
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
from poise.robust.attacks.sanity_checks import check_inputs, require_logits
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.spec import Sparsity
from poise.robust.step_sizes import DEFAULT_SPARSITY, decaying_steps, training_step
from poise.robust.threats import Threat

__all__ = ["FirstFooling", "perturb", "pgd"]


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
    sparsity: Sparsity = DEFAULT_SPARSITY,
    loss: Loss = cross_entropy,
    noise: Source = None,
    bn_mode: BNMode = "eval",
) -> AttackResult:
    """Attack for evaluation: an example is correct only if the model withstands every point that was tried.

    The image itself is the first point that is tried, then every iterate of every run. An example is dropped at the end
    of the run that fools the model. `adversarial` holds the first fooling point, or the last point tried if there is
    none.

    Args:
        model: maps (N, ...) images to (N, K) logits.
        x, y: images (N, ...) in [0, 1]; true labels (N,) int64.
        steps: gradients of one run.
        step_size: length of every step in the threat's norm; None: `step_sizes.decaying_steps`.
        restarts: runs; those after the first start at random, regardless of `random_start`.
        sparsity: for l1, coordinates per step: a count, or a range that each example draws from at each step.
        loss: what is maximised, see `attacks.losses`; for the cross entropy, its log odds, which do not underflow.
        noise: see `noise.Source`.
        bn_mode: "train" lets BN use the statistics of the attacked batch (its buffers still stay untouched).

    Warns when the loss of an example that is not fooled had a gradient of zero at every point.

    Raises:
        ValueError: invalid images, labels or radius, see `sanity_checks.check_inputs`.
        PoiseError: the model has no gradient, or the loss gradient of an example was not finite.
    """
    y = check_inputs(x, y, threat)
    sizes = decaying_steps(threat.eps, steps) if step_size is None else (step_size,) * steps
    ascent = _Ascent(threat, sizes, sparsity, without_underflow(loss))
    streams = as_noise(noise, x)
    with attack_mode(model, bn_mode):
        logits = scores(model, x)
        require_logits(logits, y)
        adversarial = x.clone()
        correct = logits.argmax(1) == y
        unmoved = correct.clone()
        for run in range(restarts):
            alive = correct.nonzero().flatten()
            if len(alive) == 0:
                break
            run_ascent = replace(ascent, threat=threat.select(alive))
            run_noise = streams.select(alive).fold_in(run)
            start = run_ascent.start(x[alive], run_noise, random=random_start or run > 0)
            first_fooling = FirstFooling(x[alive], y[alive])
            last, zero_gradient = run_ascent.run(model, x[alive], y[alive], start, first_fooling)
            unmoved[alive] &= zero_gradient
            first_fooling(last, scores(model, last))
            adversarial[alive] = torch.where(column(first_fooling.fooled, x), first_fooling.point, last)
            correct[alive] = ~first_fooling.fooled
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
    sparsity: Sparsity = DEFAULT_SPARSITY,
    loss: Loss = cross_entropy,
    noise: Source = None,
    bn_mode: BNMode = "eval",
) -> Tensor:
    """Attack for training: the last iterate, like x, detached, at `steps` gradients and no forward beyond them.

    Arguments and errors as for `pgd`, but a `step_size` of None is `step_sizes.training_step`. With `spread`, every run
    starts at the image plus spread * N(0, I), projected onto the threat, regardless of `random_start`. With restarts >
    1 each example keeps the run of highest final loss, which costs two forwards per further run.
    """
    y = check_inputs(x, y, threat)
    size = training_step(threat.eps, steps) if step_size is None else step_size
    ascent = _Ascent(threat, (size,) * steps, sparsity, without_underflow(loss))
    streams = as_noise(noise, x)
    with attack_mode(model, bn_mode):
        start = ascent.start(x, streams, random=random_start, spread=spread)
        best, _ = ascent.run(model, x, y, start)
        for run in range(1, restarts):
            start = ascent.start(x, streams.fold_in(run), random=True, spread=spread)
            other, _ = ascent.run(model, x, y, start)
            best_loss = ascent.loss(scores(model, best), y)
            other_loss = ascent.loss(scores(model, other), y)
            best = torch.where(column(other_loss > best_loss, x), other, best)
    return best


class FirstFooling:
    """Called with points and their logits in turn, keeps the first point of each example that the model gets wrong."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.y = y
        self.point = x
        self.fooled = torch.zeros_like(y, dtype=torch.bool)

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
        """All random numbers of one run, drawn before its loop."""
        width = x[0].numel() + 1
        if spread is not None:
            delta = self.threat.project(x, spread * noise.normal(width - 1, x.dtype).view_as(x))
        elif random:
            delta = self.threat.random_start_from(x, noise.uniform(width, x.dtype))
        else:
            delta = torch.zeros_like(x)
        low, high = (self.sparsity, self.sparsity) if isinstance(self.sparsity, int) else self.sparsity
        counts = noise.fold_in(-1).integers(low, high + 1, len(self.sizes))  # (N, steps)
        return _Start(delta, counts)

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        start: _Start,
        observe: Callable[[Tensor, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last iterate, and whether the gradient was zero at every step, bool (N,).

        `observe` is called with every earlier iterate and its logits, which are computed anyway.
        """
        zero_gradient = torch.ones_like(y, dtype=torch.bool)
        steps = len(self.sizes)
        delta = start.delta
        finite = torch.full((len(x),), steps, device=x.device)  # steps before the first gradient that is not finite
        for step, size in enumerate(self.sizes):
            point = x + delta
            grad, _, logits = input_gradient(model, point, y, self.loss)
            largest = grad.flatten(1).abs().amax(1)  # (N,)
            finite = torch.where(largest.isfinite(), finite, finite.clamp(max=step))
            zero_gradient = zero_gradient & (largest == 0)
            if observe is not None:
                observe(point, logits)
            ascent = self.threat.steepest_step(grad, size, at=point, sparsity=start.counts[:, step])
            delta = self.threat.project(x, delta + ascent)
        require_finite(finite, steps)
        return x + delta, zero_gradient
