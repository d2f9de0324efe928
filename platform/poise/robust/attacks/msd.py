"""Multi steepest descent: one perturbation that at every step takes the best of one step in each of several norms.

Source: Maini, Wong and Kolter, "Adversarial robustness against the union of multiple perturbation models" (2020);
papers/adversarial.md, section 3. Every point lies in at least one of the balls, and need not lie in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    lowest,
    require_finite,
    scores,
    warn_unmoved,
)
from poise.robust.attacks.losses import Loss, cross_entropy, without_underflow
from poise.robust.attacks.pgd import decaying_steps, training_step
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.spec import Sparsity
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
    sparsity: Sparsity = (5, 20),
    loss: Loss = cross_entropy,
    noise: Source = None,
    bn_mode: BNMode = "eval",
) -> AttackResult:
    """MSD for evaluation: an example is correct only if the model withstands every point that was tried.

    `adversarial` holds the first fooling point, the image itself where the model is wrong already, or else the point of
    highest loss. An example leaves at the end of the run that fools the model.

    Args:
        model: maps (N, ...) images to (N, K) logits.
        x, y: images (N, ...) in [0, 1]; true labels (N,) int64.
        threats: the balls, at least one.
        steps: gradients of one run, each followed by a forward per threat.
        step_sizes: lengths of every step, each in its own norm; None: steps that shrink, see `pgd.decaying_steps`.
        restarts: runs; the first starts at the image, the others at random in one ball after the other.
        sparsity, loss, noise, bn_mode: as for `pgd`.

    Raises:
        ValueError: no threat, or step sizes for other norms than the threats'.
        PoiseError: a loss or its gradient was not finite.
    """
    sizes = _sizes(threats, steps, step_sizes, decaying_steps)
    y = check_inputs(x, y, *threats.values())
    climb, streams = _Climb(threats, steps, sizes, sparsity, without_underflow(loss)), as_noise(noise, x)
    balls = list(threats.values())
    with attack_mode(model, bn_mode):
        delta, height = torch.zeros_like(x), lowest(x)
        logits = scores(model, x)
        require_logits(logits, y)
        height[logits.argmax(1) != y] = torch.inf
        unmoved = height < torch.inf
        for run in range(restarts):
            alive = (height < torch.inf).nonzero().flatten()
            if len(alive) == 0:
                break
            own, near = streams.pick(alive).at(run), x[alive]
            start = torch.zeros_like(near)
            if run > 0:
                ball = balls[(run - 1) % len(balls)].pick(alive)
                start = ball.start_from(near, own.uniform(near[0].numel() + 1, x.dtype))
            found = climb.among(alive).run(model, near, y[alive], start, own, alive, seek=True)
            unmoved[alive] &= found.blind
            better = found.height > height[alive]
            delta[alive] = torch.where(column(better, x), found.delta, delta[alive])
            height[alive] = torch.where(better, found.height, height[alive])
    correct = height < torch.inf
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
    sparsity: Sparsity = (5, 20),
    loss: Loss = cross_entropy,
    noise: Source = None,
    bn_mode: BNMode = "eval",
) -> Tensor:
    """MSD for training: of the image and all that was tried, the point of highest loss, like x, detached.

    Arguments and errors as for `msd`, but `step_sizes` of None are each `pgd.training_step`. It costs `steps` gradients
    and as many forwards per threat.
    """
    sizes = _sizes(threats, steps, step_sizes, lambda eps, steps: (training_step(eps, steps),) * steps)
    y = check_inputs(x, y, *threats.values())
    climb, rows = _Climb(threats, steps, sizes, sparsity, without_underflow(loss)), torch.arange(len(x))
    with attack_mode(model, bn_mode):
        start = torch.zeros_like(x)
        return x + climb.run(model, x, y, start, as_noise(noise, x), rows, seek=False).delta


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
    """Keeps, of the points it is shown, that of highest loss; with `seek`, the first that the model gets wrong."""

    def __init__(self, delta: Tensor, y: Tensor, seek: bool) -> None:
        self.y, self.seek, self.delta, self.height = y, seek, delta, lowest(delta)
        self.blind = torch.ones_like(y, dtype=torch.bool)  # whose gradient was zero at every step

    def see(self, delta: Tensor, losses: Tensor, logits: Tensor) -> None:
        height = torch.where(logits.argmax(1) != self.y, torch.inf, losses) if self.seek else losses
        better = height > self.height
        self.delta = torch.where(column(better, delta), delta, self.delta)
        self.height = torch.where(better, height, self.height)


@dataclass(frozen=True)
class _Climb:
    """One run."""

    threats: Mapping[str, Threat]
    steps: int
    sizes: Mapping[str, Sequence[float]]
    sparsity: Sparsity
    loss: Loss

    def among(self, rows: Tensor) -> _Climb:
        return replace(self, threats={norm: threat.pick(rows) for norm, threat in self.threats.items()})

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, noise: Noise, rows: Tensor, *, seek: bool
    ) -> _Highest:
        """The best point met; with `seek`, the first that fools the model. `rows`: as for `require_finite`."""
        low, high = (self.sparsity, self.sparsity) if isinstance(self.sparsity, int) else self.sparsity
        counts = noise.at(-1).integers(low, high + 1, self.steps)
        highest, finite = _Highest(delta, y, seek), torch.full((len(x),), self.steps, device=x.device)
        for step in range(self.steps):
            grad, losses, logits = input_gradient(model, x + delta, y, self.loss)
            largest = grad.flatten(1).abs().amax(1)
            finite = torch.where(largest.isfinite(), finite, finite.clamp(max=step))
            highest.blind &= largest == 0
            highest.see(delta, losses, logits)
            candidates = self._candidates(x, delta, grad, counts[:, step], step)
            reached = []
            for candidate in candidates:
                logits = scores(model, x + candidate)
                reached.append(self.loss(logits, y))
                highest.see(candidate, reached[-1], logits)
            best = torch.stack(reached).argmax(0)
            delta = torch.stack(candidates)[best, torch.arange(len(x), device=x.device)]
        require_finite(finite, self.steps, rows)
        return highest

    def _candidates(self, x: Tensor, delta: Tensor, grad: Tensor, counts: Tensor, step: int) -> list[Tensor]:
        """One steepest step from delta in each norm, back into the ball of that norm."""
        return [
            threat.project(x, delta + threat.steepest(grad, self.sizes[norm][step], at=x + delta, sparsity=counts))
            for norm, threat in self.threats.items()
        ]
