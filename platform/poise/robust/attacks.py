"""Projected gradient ascent on the loss of a model, for any threat.

The contract of every attack here (papers/adversarial.md, section 1): the loss is the cross entropy of the true labels,
summed over the batch (a mean would only shrink gradients towards underflow); gradients are taken for the input alone
and parameters are frozen meanwhile, so that no weight gradient is computed or accumulated; BN and dropout are in eval
mode; training flags, `requires_grad`, BN buffers and the global random stream are afterwards what they were before.

Attack the bare model: under DistributedDataParallel pass `ddp.module`, since every rank attacks its own examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poise.errors import PoiseError
from poise.robust.spec import Sparsity
from poise.robust.threats import Threat

__all__ = ["AttackResult", "BNMode", "Source", "attack_mode", "cross_entropy", "perturb", "pgd"]

BNMode = Literal["eval", "train"]
Source = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from: one generator for the batch; or one per example, and then what an example meets does not
depend on its batch; or None, a fresh generator with a fixed seed (the same noise at every call)."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack found: `adversarial` like x, and `correct` bool (N,), True where the model withstood all of it."""

    adversarial: Tensor
    correct: Tensor


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
    generator: Source = None,
    bn_mode: BNMode = "eval",
) -> AttackResult:
    """Attack for evaluation: an example is correct only if the model withstands every point that was tried.

    The image itself counts as the first point, then every iterate of every run; an example leaves at the end of the
    run that fools the model. `adversarial` holds the first fooling point, or the last point tried if there is none.

    Args:
        model: maps (N, ...) images to (N, K) logits.
        x, y: images (N, ...) in [0, 1]; true labels (N,) int64.
        steps: gradients of one run.
        step_size: length of a step in the threat's norm; None is 2.5 * eps / steps, at most eps.
        restarts: runs; those after the first start at random whatever `random_start` says.
        sparsity: for l1, coordinates per step: a count, or a range that each example draws from at each step.
        generator: see `Source`.
        bn_mode: "train" lets BN use the statistics of the attacked batch (its buffers still stay untouched).

    Raises:
        PoiseError: the loss gradient of an example was not finite.
    """
    ascent = _Ascent(threat, steps, step_size, sparsity)
    source = torch.Generator() if generator is None else generator
    with attack_mode(model, bn_mode):
        adversarial, correct = x.clone(), _scores(model, x).argmax(1) == y
        for run in range(restarts):
            alive = correct.nonzero().flatten()
            if len(alive) == 0:
                break
            start = ascent.start(x[alive], _pick(source, alive), random=random_start or run > 0)
            watch = _FirstFooling(x[alive], y[alive])
            last = ascent.climb(model, x[alive], y[alive], start, watch)
            watch(last, _scores(model, last))
            adversarial[alive], correct[alive] = torch.where(_like(watch.fooled, x), watch.point, last), ~watch.fooled
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
    sparsity: Sparsity = (5, 20),
    generator: Source = None,
    bn_mode: BNMode = "eval",
) -> Tensor:
    """Attack for training: the last iterate, like x, detached, at `steps` gradients and no forward beyond them.

    Arguments and errors as for `pgd`. With restarts > 1 each example keeps the run of highest final loss, which costs
    two forwards per further run.
    """
    ascent = _Ascent(threat, steps, step_size, sparsity)
    source = torch.Generator() if generator is None else generator
    with attack_mode(model, bn_mode):
        best = ascent.climb(model, x, y, ascent.start(x, source, random=random_start))
        for _ in range(restarts - 1):
            other = ascent.climb(model, x, y, ascent.start(x, source, random=True))
            before, after = (cross_entropy(_scores(model, point), y, reduction="none") for point in (best, other))
            best = torch.where(_like(after > before, x), other, best)
    return best


def cross_entropy(logits: Tensor, y: Tensor, *, reduction: str) -> Tensor:
    """Cross entropy of logits (N, K) and labels (N,), in float32 or better whatever the model computes in."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, y, reduction=reduction)


@contextmanager
def attack_mode(model: nn.Module, bn_mode: BNMode = "eval") -> Iterator[None]:
    """Eval mode and frozen parameters inside; flags, `requires_grad` and buffers restored exactly at the end.

    With bn_mode "train", BN layers are lent out without their running statistics: in eval mode they then normalise by
    the batch and have nothing to update.
    """
    flags = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lent = [m for m in model.modules() if isinstance(m, _BatchNorm)] if bn_mode == "train" else []
    statistics = [(m, m.running_mean, m.running_var) for m in lent]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        for norm in lent:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, mean, var in statistics:
            norm.running_mean, norm.running_var = mean, var
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in flags:
            module.training = training


@dataclass(frozen=True)
class _Start:
    delta: Tensor
    counts: Tensor  # (N, steps): coordinates that each l1 step moves


@dataclass(frozen=True)
class _Ascent:
    """One run of steepest ascent with projection."""

    threat: Threat
    steps: int
    step_size: float | None
    sparsity: Sparsity

    def start(self, x: Tensor, source: torch.Generator | Sequence[torch.Generator], *, random: bool) -> _Start:
        """Everything that one run draws, before it begins, so that its loop never waits for the device."""
        delta, width = torch.zeros_like(x), x[0].numel() + 1
        if random:
            uniform = _draw(
                source, len(x), lambda n, g: torch.rand(n, width, generator=g, dtype=x.dtype, device=g.device)
            )
            delta = self.threat.start_from(x, uniform)
        low, high = (self.sparsity, self.sparsity) if isinstance(self.sparsity, int) else self.sparsity
        counts = _draw(
            source, len(x), lambda n, g: torch.randint(low, high + 1, (n, self.steps), generator=g, device=g.device)
        )
        return _Start(delta, counts.to(x.device))

    def climb(
        self, model: nn.Module, x: Tensor, y: Tensor, start: _Start, watch: _FirstFooling | None = None
    ) -> Tensor:
        """The last iterate; `watch` sees every earlier one together with its logits, which cost nothing extra."""
        size = min(2.5 * self.threat.eps / self.steps, self.threat.eps) if self.step_size is None else self.step_size
        delta, finite = start.delta, torch.full((len(x),), self.steps, device=x.device)
        for step in range(self.steps):
            point = (x + delta).requires_grad_()
            with torch.enable_grad():
                logits = model(point)
                loss = cross_entropy(logits, y, reduction="sum")
            (grad,) = torch.autograd.grad(loss, point)
            finite = torch.where(grad.flatten(1).abs().amax(1).isfinite(), finite, finite.clamp(max=step))
            point = point.detach()
            if watch is not None:
                watch(point, logits.detach())
            ascent = self.threat.steepest(grad, size, at=point, sparsity=start.counts[:, step])
            delta = self.threat.project(x, delta + ascent)
        _require_finite(finite, self.steps)
        return x + delta


class _FirstFooling:
    """Keeps, of the points it is shown, the first of each example that the model gets wrong."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.y, self.point, self.fooled = y, x, torch.zeros_like(y, dtype=torch.bool)

    def __call__(self, point: Tensor, logits: Tensor) -> None:
        wrong = (logits.argmax(1) != self.y) & ~self.fooled
        self.point = torch.where(_like(wrong, point), point, self.point)
        self.fooled = self.fooled | wrong


def _draw(
    source: torch.Generator | Sequence[torch.Generator], n: int, draw: Callable[[int, torch.Generator], Tensor]
) -> Tensor:
    if isinstance(source, torch.Generator):
        return draw(n, source)
    return torch.cat([draw(1, generator) for generator in source])


def _pick(
    source: torch.Generator | Sequence[torch.Generator], alive: Tensor
) -> torch.Generator | Sequence[torch.Generator]:
    return source if isinstance(source, torch.Generator) else [source[i] for i in alive.tolist()]


@torch.no_grad()
def _scores(model: nn.Module, x: Tensor) -> Tensor:
    scores: Tensor = model(x)
    return scores


def _require_finite(finite: Tensor, steps: int) -> None:
    """`finite` (N,): steps before the first bad gradient of each example. The one place that waits for the device."""
    if not bool((finite == steps).all()):
        index = int(finite.argmin())
        raise PoiseError(
            f"attack: the loss gradient of example {index} of the batch is not finite at step {int(finite[index])}: "
            "the model has diverged, or its precision is too low for this attack (use bf16 or fp32, not fp16)"
        )


def _like(flags: Tensor, x: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (x.ndim - 1))
