"""MSD, multi steepest descent: one perturbation whose every step is the best of one step in each of several norms.

Source: Maini, Wong and Kolter, "Adversarial robustness against the union of multiple perturbation models" (2020).
Every point lies in at least one of the balls, and need not lie in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from poise.robust.attacks.base import (
    AttackResult,
    BNMode,
    attack_mode,
    column,
    input_gradient,
    lowest,
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

__all__ = ["msd", "msd_perturb"]


def msd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Mapping[str, Threat],
    *,
    steps: int,
    step_sizes: Mapping[str, float] | None = None,
    restarts: int = 1,
    sparsity: Sparsity = DEFAULT_SPARSITY,
    loss: Loss = cross_entropy,
    noise: Source = None,
    bn_mode: BNMode = "eval",
) -> AttackResult:
    """MSD for evaluation: an example is correct only if the model withstands every point that was tried.

    `adversarial` holds the first fooling point, the image itself where the model is wrong already, or else the point of
    highest loss. An example is dropped at the end of the run that fools the model.

    Args:
        model: maps (N, ...) images to (N, K) logits.
        x, y: images (N, ...) in [0, 1]; true labels (N,) int64.
        threats: the balls, at least one.
        steps: gradients of one run, each followed by a forward per threat.
        step_sizes: lengths of every step, each in its own norm; None: `step_sizes.decaying_steps`.
        restarts: runs; the first starts at the image, the others at random in one ball after the other.
        sparsity, loss, noise, bn_mode: as for `pgd`.

    Raises:
        ValueError: no threat, or step sizes for other norms than the threats'.
        PoiseError: a loss or its gradient was not finite.
    """
    sizes = _sizes(threats, steps, step_sizes, decaying_steps)
    y = check_inputs(x, y, *threats.values())
    attack = _Run(threats, steps, sizes, sparsity, without_underflow(loss))
    streams = as_noise(noise, x)
    balls = list(threats.values())
    with attack_mode(model, bn_mode):
        delta = torch.zeros_like(x)  # the best point, and its loss: infinite once the model is fooled
        best_loss = lowest(x)
        logits = scores(model, x)
        require_logits(logits, y)
        best_loss[logits.argmax(1) != y] = torch.inf
        unmoved = best_loss < torch.inf
        for run in range(restarts):
            alive = (best_loss < torch.inf).nonzero().flatten()
            if len(alive) == 0:
                break
            run_noise = streams.select(alive).fold_in(run)
            images = x[alive]
            start = torch.zeros_like(images)
            if run > 0:
                ball = balls[(run - 1) % len(balls)].select(alive)
                start = ball.random_start_from(images, run_noise.uniform(images[0].numel() + 1, x.dtype))
            highest = attack.select(alive).run(model, images, y[alive], start, run_noise, alive, seek=True)
            unmoved[alive] &= highest.zero_gradient
            better = highest.best_loss > best_loss[alive]
            delta[alive] = torch.where(column(better, x), highest.delta, delta[alive])
            best_loss[alive] = torch.where(better, highest.best_loss, best_loss[alive])
    correct = best_loss < torch.inf
    warn_unmoved(unmoved & correct)
    return AttackResult(x + delta, correct)


def msd_perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Mapping[str, Threat],
    *,
    steps: int,
    step_sizes: Mapping[str, float] | None = None,
    sparsity: Sparsity = DEFAULT_SPARSITY,
    loss: Loss = cross_entropy,
    noise: Source = None,
    bn_mode: BNMode = "eval",
) -> Tensor:
    """MSD for training: the point of highest loss among the image and all points tried; like x, detached.

    Arguments and errors as for `msd`, but with `step_sizes` of None each step has length `pgd.training_step`. It costs
    `steps` gradients and as many forwards per threat.
    """
    sizes = _sizes(threats, steps, step_sizes, _equal_steps)
    y = check_inputs(x, y, *threats.values())
    attack = _Run(threats, steps, sizes, sparsity, without_underflow(loss))
    rows = torch.arange(len(x))
    with attack_mode(model, bn_mode):
        start = torch.zeros_like(x)
        highest = attack.run(model, x, y, start, as_noise(noise, x), rows, seek=False)
        return x + highest.delta


def _equal_steps(eps: float, steps: int) -> Sequence[float]:
    return (training_step(eps, steps),) * steps


def _sizes(
    threats: Mapping[str, Threat],
    steps: int,
    step_sizes: Mapping[str, float] | None,
    default: Callable[[float, int], Sequence[float]],
) -> dict[str, Sequence[float]]:
    """The length of each step, by norm; `default` gives those of one ball from its eps and the number of steps."""
    if not threats:
        raise ValueError("MSD needs at least one threat")
    if step_sizes is None:
        return {norm: default(threat.eps, steps) for norm, threat in threats.items()}
    if set(step_sizes) != set(threats):
        raise ValueError(f"step sizes are for {', '.join(step_sizes)} and threats for {', '.join(threats)}: give both")
    return {norm: (step_sizes[norm],) * steps for norm in threats}


class _Highest:
    """The point of highest loss among those passed to `update`; with `seek`, the first that the model gets wrong."""

    def __init__(self, delta: Tensor, y: Tensor, seek: bool) -> None:
        self.y = y
        self.seek = seek
        self.delta = delta
        self.best_loss = lowest(delta)
        self.zero_gradient = torch.ones_like(y, dtype=torch.bool)  # whether the gradient was zero at every step

    def update(self, delta: Tensor, losses: Tensor, logits: Tensor) -> None:
        best_loss = torch.where(logits.argmax(1) != self.y, torch.inf, losses) if self.seek else losses
        better = best_loss > self.best_loss
        self.delta = torch.where(column(better, delta), delta, self.delta)
        self.best_loss = torch.where(better, best_loss, self.best_loss)


@dataclass(frozen=True)
class _Run:
    """One run of the attack, on all examples or on some of them (`select`)."""

    threats: Mapping[str, Threat]
    steps: int
    sizes: Mapping[str, Sequence[float]]
    sparsity: Sparsity
    loss: Loss

    def select(self, rows: Tensor) -> _Run:
        """The run on the examples `rows`."""
        return replace(self, threats={norm: threat.select(rows) for norm, threat in self.threats.items()})

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, noise: Noise, rows: Tensor, *, seek: bool
    ) -> _Highest:
        """The best point visited; with `seek`, the first that fools the model. `rows`: as for `require_finite`."""
        low, high = (self.sparsity, self.sparsity) if isinstance(self.sparsity, int) else self.sparsity
        counts = noise.fold_in(-1).integers(low, high + 1, self.steps)  # (N, steps)
        highest = _Highest(delta, y, seek)
        finite = torch.full(
            (len(x),), self.steps, device=x.device
        )  # steps before the first gradient that is not finite
        for step in range(self.steps):
            grad, losses, logits = input_gradient(model, x + delta, y, self.loss)
            largest = grad.flatten(1).abs().amax(1)  # (N,)
            finite = torch.where(largest.isfinite(), finite, finite.clamp(max=step))
            highest.zero_gradient &= largest == 0
            highest.update(delta, losses, logits)
            candidates = self._candidates(x, delta, grad, counts[:, step], step)
            candidate_losses = []
            for candidate in candidates:
                logits = scores(model, x + candidate)
                losses = self.loss(logits, y)
                candidate_losses.append(losses)
                highest.update(candidate, losses, logits)
            best = torch.stack(candidate_losses).argmax(0)  # (N,), from (P, N)
            delta = torch.stack(candidates)[best, torch.arange(len(x), device=x.device)]
        require_finite(finite, self.steps, rows)
        return highest

    def _candidates(self, x: Tensor, delta: Tensor, grad: Tensor, counts: Tensor, step: int) -> list[Tensor]:
        """One steepest step from delta in each norm, projected onto the ball of that norm."""
        candidates = []
        for norm, threat in self.threats.items():
            ascent = threat.steepest_step(grad, self.sizes[norm][step], at=x + delta, sparsity=counts)
            candidates.append(threat.project(x, delta + ascent))
        return candidates
