"""Auto-PGD: projected gradient ascent that chooses its own step sizes, per example, under linf, l2 and l1.

Sources: Croce and Hein, "Reliable evaluation ..." (2020) for linf and l2, "Mind the box" (2021) for l1;
papers/adversarial.md, sections 2 and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from poise.robust.attacks.checks import check_inputs, require_logits
from poise.robust.attacks.contract import (
    AttackResult,
    BNMode,
    at_once,
    attack_mode,
    choose,
    input_gradient,
    lowest,
    require_finite,
    scores,
    warn_unmoved,
)
from poise.robust.attacks.losses import (
    LOSSES,
    Loss,
    cross_entropy,
    targeted_dlr,
    targeted_margin,
    without_underflow,
)
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.threats import Threat

__all__ = ["apgd", "apgd_perturb", "checkpoints"]

_Stage = tuple[Threat, int]  # a ball, and the steps taken in it
_Aimed = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits (N, K), labels (N,), targets (N,) -> losses (N,)
_Record = TypeVar("_Record")


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    random_start: bool = True,
    targets: int = 9,
    large_eps: bool = True,
    noise: Source = None,
    bn_mode: BNMode = "eval",
    batch_size: int | None = None,
) -> AttackResult:
    """APGD for evaluation: an example is correct only if the model withstands every feasible point that was visited.

    `adversarial` holds the first fooling point, the image itself where the model is wrong already, or else the visited
    point of highest loss. Examples leave at the checkpoint that follows the step which fools the model.

    Args:
        model: maps (N, ...) images to (N, K) logits.
        x, y: images (N, ...) in [0, 1]; true labels (N,) int64.
        loss: "ce", "dlr", "margin", or "targeted": the targeted DLR, run after run, towards the `targets` classes
            (at most K - 1) of highest clean logits; for a model of fewer than four classes, the targeted margin.
        steps: gradients of one run.
        restarts: runs, per target; those after the first start at random whatever `random_start` says.
        large_eps: for l1, spend 30, 30 and 40 % of the steps in balls of 3, 2 and 1 times eps, each stage from the best
            point of the one before.
        noise: see `noise.Source`.
        bn_mode: as for `pgd`.
        batch_size: examples that the model may be given at once: as many runs as fit go side by side, with the result
            of one after the other. None is one run at a time.

    Raises:
        ValueError: see `checks.check_inputs`; an unknown loss, a count below 1, or "dlr" for a model of fewer than
            three classes.
        PoiseError: a loss or its gradient was not finite.
    """
    if min(steps, restarts, targets) < 1:
        raise ValueError(f"steps, restarts and targets are at least 1, not {steps}, {restarts} and {targets}")
    y = check_inputs(x, y, threat)
    streams, stages = as_noise(noise, x), _stages(threat, steps, large_eps and threat.norm == "l1")
    with attack_mode(model, bn_mode):
        clean = scores(model, x)
        require_logits(clean, y)
        aimed, aims = _aims(loss, clean, y, targets)
        delta, height = torch.zeros_like(x), lowest(x)
        height[clean.argmax(1) != y] = torch.inf
        unmoved = height < torch.inf
        runs = [(streams.at(i), *run) for i, run in enumerate(product(aims.unbind(1), range(restarts)))]
        while runs and len(alive := (height < torch.inf).nonzero().flatten()):
            group = runs[: at_once(len(alive), batch_size)]
            runs, rows = runs[len(group) :], alive.repeat(len(group))
            among = [(ball.pick(rows), count) for ball, count in stages]
            first = stages[0][0].pick(alive)
            starts = [_start(first, x[alive], draws.pick(alive), random=random_start or n > 0) for draws, _, n in group]
            target = torch.cat([aim[alive] for _, aim, _ in group])
            found, reached, blind = _through(among, model, aimed, x[rows], y[rows], target, torch.cat(starts), rows)
            unmoved[alive] &= blind.view(len(group), -1).all(0)
            for point, top in zip(found.chunk(len(group)), reached.chunk(len(group)), strict=True):
                better = top > height[alive]
                delta[alive] = choose(better, point, delta[alive])
                height[alive] = torch.where(better, top, height[alive])
    correct = height < torch.inf
    warn_unmoved(unmoved & correct)
    return AttackResult(x + delta, correct)


def apgd_perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int = 10,
    restarts: int = 1,
    random_start: bool = False,
    spread: float | None = None,
    loss: Loss = cross_entropy,
    noise: Source = None,
    bn_mode: BNMode = "eval",
) -> Tensor:
    """APGD for training: the visited point of highest loss, like x, detached, at `steps` gradients and one forward.

    Arguments and errors as for `apgd`, but `loss` is any of `attacks.losses`, and under l1 the first steps move 5 % of
    the coordinates, not 20 %. With restarts > 1 each example keeps the best of all runs. `spread`: as for `perturb`.
    """
    y = check_inputs(x, y, threat)
    streams, rows = as_noise(noise, x), torch.arange(len(x), device=x.device)
    climbed = without_underflow(loss)
    ascent = _Ascent(model, threat, lambda logits, y, _: climbed(logits, y), seek=False)
    best, height = torch.zeros_like(x), lowest(x)
    with attack_mode(model, bn_mode):
        for run in range(restarts):
            start = _start(threat, x, streams.at(run), random=random_start or run > 0, spread=spread)
            found, reached, _ = ascent.climb(x, y, y, start, steps, share=0.05, rows=rows)
            best = choose(reached > height, found, best)
            height = torch.maximum(reached, height)
    return x + best


def checkpoints(threat: Threat, steps: int) -> tuple[int, ...]:
    """The steps of a run after which step sizes are judged.

    linf and l2: 22 % of the run, then gaps that shrink by 3 % each down to 6 %. l1: every 4 %.
    """
    gap, floor, fall = (max(steps * percent // 100, 1) for percent in (22, 6, 3))
    if threat.norm == "l1":
        gap, fall = max(steps * 4 // 100, 1), 0
    found, at = [], gap
    while at <= steps:
        found.append(at)
        gap = max(gap - fall, floor) if fall else gap
        at += gap
    return tuple(found)


def _stages(threat: Threat, steps: int, large_eps: bool) -> list[_Stage]:
    if not large_eps:
        return [(threat, steps)]
    third = steps * 3 // 10
    stages = [(3, third), (2, third), (1, steps - 2 * third)]
    return [(replace(threat, eps=times * threat.eps), count) for times, count in stages if count]


def _aims(loss: str, clean: Tensor, y: Tensor, targets: int) -> tuple[_Aimed, Tensor]:
    """What is climbed, and each example's targets (N, T) in falling order of clean logits; T = 1 without a target."""
    if loss in LOSSES:
        climbed = without_underflow(LOSSES[loss])
        return lambda logits, y, _: climbed(logits, y), y.unsqueeze(1)
    if loss != "targeted":
        raise ValueError(f"unknown loss {loss!r}: use one of {', '.join(LOSSES)}, targeted")
    classes = clean.shape[1]
    others = clean.scatter(1, y.unsqueeze(1), -torch.inf)
    ranked = others.topk(min(targets, classes - 1), dim=1)
    aims = torch.where(ranked.values > -torch.inf, ranked.indices, ranked.indices[:, :1])  # no class that is masked
    return targeted_dlr if classes >= 4 else targeted_margin, aims


def _start(threat: Threat, x: Tensor, noise: Noise, *, random: bool, spread: float | None = None) -> Tensor:
    """Under l1 a random start is N(0, I) projected: as sparse as what is sought, which a point of the ball is not."""
    if random and threat.norm == "l1" and spread is None:
        spread = 1.0
    if spread is not None:
        return threat.project(x, spread * noise.normal(x[0].numel(), x.dtype).view_as(x))
    return threat.start_from(x, noise.uniform(x[0].numel() + 1, x.dtype)) if random else torch.zeros_like(x)


def _through(
    stages: Sequence[_Stage],
    model: nn.Module,
    aimed: _Aimed,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    delta: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One run through balls that shrink to the threat itself, the last and only one where a point counts as found."""
    for number, (ball, steps) in enumerate(stages):
        ascent = _Ascent(model, ball, aimed, seek=number == len(stages) - 1)
        share = None if number else 0.2
        delta, height, blind = ascent.climb(x, y, target, ball.project(x, delta), steps, share=share, rows=rows)
    return delta, height, blind


@dataclass(frozen=True)
class _Walk:
    """Where the examples of a run stand and the best that they met: all (N, ...)."""

    x: Tensor
    y: Tensor
    target: Tensor
    delta: Tensor
    previous: Tensor
    grad: Tensor
    loss: Tensor
    best: Tensor
    best_grad: Tensor
    best_loss: Tensor  # infinite once the model is fooled, so that the first fooling point is never replaced
    rises: Tensor  # steps since the last checkpoint that raised the loss
    finite: Tensor  # steps before the first gradient or loss that was not finite
    blind: Tensor  # bool, a gradient of zero at every point

    def back_to_best(self, where: Tensor) -> _Walk:
        return replace(
            self,
            delta=choose(where, self.best, self.delta),
            grad=choose(where, self.best_grad, self.grad),
            loss=torch.where(where, self.best_loss, self.loss),
            rises=torch.zeros_like(self.rises),
        )


class _Pace(Protocol):
    """The rule for the size of the steps."""

    def step(self, threat: Threat, walk: _Walk, *, first: bool) -> Tensor:
        """The next delta."""

    def judged(self, walk: _Walk, gap: int) -> tuple[_Pace, Tensor]:
        """The pace after a checkpoint, `gap` steps after the last, and who goes back to the best point, bool (N,)."""


@dataclass(frozen=True)
class _Halving:
    """linf and l2: steps of 2 eps with momentum 0.75, halved where they stopped paying."""

    size: Tensor
    best_before: Tensor
    halved: Tensor

    @classmethod
    def begin(cls, threat: Threat, walk: _Walk) -> _Halving:
        size = torch.full_like(walk.best_loss, 2 * threat.eps)
        return cls(size, walk.best_loss, torch.zeros_like(walk.y, dtype=torch.bool))

    def step(self, threat: Threat, walk: _Walk, *, first: bool) -> Tensor:
        ascent = threat.project(walk.x, walk.delta + threat.steepest(walk.grad, self.size))
        if first:
            return ascent
        mixed = walk.delta + 0.75 * (ascent - walk.delta) + 0.25 * (walk.delta - walk.previous)
        return threat.project(walk.x, mixed)

    def judged(self, walk: _Walk, gap: int) -> tuple[_Halving, Tensor]:
        stalled = ~self.halved & (walk.best_loss <= self.best_before)
        halve = (walk.rises < 0.75 * gap) | stalled
        return _Halving(torch.where(halve, self.size / 2, self.size), walk.best_loss, halve), halve


@dataclass(frozen=True)
class _Thinning:
    """l1: steps over two thirds of the coordinates that the best point changes, long again where these became fewer."""

    eps: float
    size: Tensor
    count: Tensor
    changed: Tensor

    @classmethod
    def begin(cls, threat: Threat, walk: _Walk, share: float | None) -> _Thinning:
        """With `share` of the coordinates at first; None: as sparse as the point that the run starts from."""
        width = torch.full_like(walk.best_loss, walk.x[0].numel())
        changed = _changed(walk) if share is None else width
        count = changed / 1.5 if share is None else share * width
        return cls(threat.eps, torch.full_like(width, threat.eps), count.floor().clamp(min=1), changed)

    def step(self, threat: Threat, walk: _Walk, *, first: bool) -> Tensor:
        at = walk.x + walk.delta
        return threat.project(walk.x, walk.delta + threat.steepest(walk.grad, self.size, at=at, sparsity=self.count))

    def judged(self, walk: _Walk, gap: int) -> tuple[_Thinning, Tensor]:
        changed = _changed(walk)
        thinner = changed < 0.95 * self.changed
        size = torch.where(thinner, self.eps, (self.size / 1.5).clamp(min=self.eps / 10))
        return replace(self, size=size, count=(changed / 1.5).floor().clamp(min=1), changed=changed), thinner


def _changed(walk: _Walk) -> Tensor:
    """Coordinates that the best point changes, (N,)."""
    return (walk.best.flatten(1) != 0).sum(1).to(walk.best_loss.dtype)


@dataclass(frozen=True)
class _Ascent:
    """One run in one ball; with `seek`, a point that fools the model counts as the best there is."""

    model: nn.Module
    threat: Threat
    loss: _Aimed
    seek: bool

    def climb(
        self, x: Tensor, y: Tensor, target: Tensor, delta: Tensor, steps: int, *, share: float | None, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best delta, its loss, infinite where it fools, and whose gradient was zero at every point.

        `rows`: the places of the examples in their batch.
        """
        walk, left = self._begin(x, y, target, delta, steps), torch.arange(len(x), device=x.device)
        pace: _Pace = (
            _Thinning.begin(self.threat, walk, share) if self.threat.norm == "l1" else _Halving.begin(self.threat, walk)
        )
        best, height, finite = walk.best.clone(), walk.best_loss.clone(), walk.finite.clone()
        blind = walk.blind.clone()
        last, checks = 0, {*checkpoints(self.threat, steps), steps}
        threat = self.threat
        for step in range(1, steps + 1):
            walk = self._visit(walk, pace.step(threat, walk, first=step == 1), step, final=step == steps)
            if step in checks:
                best[left], height[left], finite[left] = walk.best, walk.best_loss, walk.finite
                blind[left] = walk.blind
                pace, back = pace.judged(walk, step - last)
                walk, last = walk.back_to_best(back), step
                if self.seek:
                    standing = (walk.best_loss < torch.inf).nonzero().flatten()
                    walk, pace, left = _pick(walk, standing), _pick(pace, standing), left[standing]
                    threat = threat.pick(standing)
                    if len(left) == 0:
                        break
        require_finite(finite, steps + 1, rows)
        return best, height, blind

    def _begin(self, x: Tensor, y: Tensor, target: Tensor, delta: Tensor, steps: int) -> _Walk:
        zero, count = torch.zeros_like(x), torch.zeros_like(y)
        low = lowest(x)
        walk = _Walk(x, y, target, delta, delta, zero, low, delta, zero, low, count, count + steps + 1, count == 0)
        return replace(self._visit(walk, delta, 0, final=False), rises=count)

    def _visit(self, walk: _Walk, delta: Tensor, step: int, *, final: bool) -> _Walk:
        """Go to delta; the gradient there is not needed at the end of the run."""
        point = walk.x + delta
        if final:
            logits = scores(self.model, point)
            grad, loss = walk.grad, self.loss(logits, walk.y, walk.target)
        else:
            grad, loss, logits = input_gradient(
                self.model, point, walk.y, lambda logits, y: self.loss(logits, y, walk.target)
            )
        largest = grad.flatten(1).abs().amax(1)
        sound = largest.isfinite() & loss.isfinite()
        height = torch.where(logits.argmax(1) != walk.y, torch.inf, loss) if self.seek else loss
        better = height > walk.best_loss
        return replace(
            walk,
            delta=delta,
            previous=walk.delta,
            grad=grad,
            loss=loss,
            best=choose(better, delta, walk.best),
            best_grad=choose(better, grad, walk.best_grad),
            best_loss=torch.where(better, height, walk.best_loss),
            rises=walk.rises + (loss > walk.loss),
            blind=walk.blind & (largest == 0),
            finite=torch.where(sound, walk.finite, walk.finite.clamp(max=step)),
        )


def _pick(record: _Record, rows: Tensor) -> _Record:
    """The examples `rows` of a record of tensors (N, ...)."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    return replace(record, **{name: v[rows] for name, v in values.items() if isinstance(v, Tensor)})  # type: ignore[type-var]
