"""Auto-PGD: projected gradient ascent that chooses its own step sizes, per example, under linf, l2 and l1.

Sources: Croce and Hein, "Reliable evaluation ..." (2020) for linf and l2, "Mind the box" (2021) for l1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor, nn

from poise.robust.attacks.apgd_schedule import (
    HalvingSchedule,
    SparsitySchedule,
    StepSchedule,
    Walk,
    checkpoints,
)
from poise.robust.attacks.base import (
    AttackResult,
    BNMode,
    attack_mode,
    choose,
    input_gradient,
    lowest,
    require_finite,
    runs_per_batch,
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
from poise.robust.attacks.sanity_checks import check_inputs, require_logits
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.spec import DEFAULT_TARGETS
from poise.robust.threats import Threat

__all__ = ["apgd", "apgd_perturb"]

_Stage = tuple[Threat, int]  # a ball, and the steps taken in it
_TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits (N, K), labels (N,), targets (N,) -> losses (N,)
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
    targets: int = DEFAULT_TARGETS,
    large_eps: bool = True,
    noise: Source = None,
    bn_mode: BNMode = "eval",
    batch_size: int | None = None,
) -> AttackResult:
    """APGD for evaluation: an example is correct only if the model withstands every feasible point that was visited.

    `adversarial` holds the first fooling point, the image itself where the model is wrong already, or else the visited
    point of highest loss. An example is dropped at the first checkpoint after the step that fools the model.

    Args:
        model: maps (N, ...) images to (N, K) logits.
        x, y: images (N, ...) in [0, 1]; true labels (N,) int64.
        loss: "ce", "dlr", "cw", or "targeted": the targeted DLR loss, with runs towards each of the `targets` classes
            (at most K - 1) of highest clean logits; for a model of fewer than four classes, the targeted margin.
        steps: gradients of one run.
        restarts: runs, per target; those after the first start at random, regardless of `random_start`.
        large_eps: for l1, spend 30, 30 and 40 % of the steps in balls of 3, 2 and 1 times eps, each stage from the best
            point of the one before.
        noise: see `noise.Source`.
        bn_mode: as for `pgd`.
        batch_size: the largest batch for the model: as many runs as fit share a batch, with the same result as one
            after the other. None is one run at a time.

    Raises:
        ValueError: see `sanity_checks.check_inputs`; an unknown loss, a count below 1, or "dlr" for a model of fewer
            than three classes.
        PoiseError: a loss or its gradient was not finite.
    """
    if min(steps, restarts, targets) < 1:
        raise ValueError(f"steps, restarts and targets are at least 1, not {steps}, {restarts} and {targets}")
    y = check_inputs(x, y, threat)
    streams = as_noise(noise, x)
    stages = _stages(threat, steps, large_eps and threat.norm == "l1")
    with attack_mode(model, bn_mode):
        clean = scores(model, x)
        require_logits(clean, y)
        targeted_loss, ranked = _loss_and_targets(loss, clean, y, targets)  # ranked (N, T)
        delta = torch.zeros_like(x)  # the best of all runs, and its loss: infinite once the model is fooled
        best_loss = lowest(x)
        best_loss[clean.argmax(1) != y] = torch.inf
        unmoved = best_loss < torch.inf
        runs = []  # of each run: its noise, its targets (N,), its number among the restarts
        for index, (target, restart) in enumerate(product(ranked.unbind(1), range(restarts))):
            runs.append((streams.fold_in(index), target, restart))
        while runs and len(alive := (best_loss < torch.inf).nonzero().flatten()):
            # as many runs as fit share one batch: the examples that are alive, once per run
            group = runs[: runs_per_batch(len(alive), batch_size)]
            runs = runs[len(group) :]
            rows = alive.repeat(len(group))
            group_stages = [(ball.select(rows), count) for ball, count in stages]
            first_ball = stages[0][0].select(alive)
            starts = []
            for run_noise, _, restart in group:
                is_random = random_start or restart > 0
                starts.append(_start(first_ball, x[alive], run_noise.select(alive), random=is_random))
            targets_of_rows = torch.cat([target[alive] for _, target, _ in group])
            best, run_losses, zero_gradient = _run_stages(
                group_stages, model, targeted_loss, x[rows], y[rows], targets_of_rows, torch.cat(starts), rows
            )
            unmoved[alive] &= zero_gradient.view(len(group), -1).all(0)
            for run_best, run_loss in zip(best.chunk(len(group)), run_losses.chunk(len(group)), strict=True):
                better = run_loss > best_loss[alive]
                delta[alive] = choose(better, run_best, delta[alive])
                best_loss[alive] = torch.where(better, run_loss, best_loss[alive])
    correct = best_loss < torch.inf
    warn_unmoved(unmoved & correct)
    return AttackResult(x + delta, correct)


def apgd_perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int,
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
    streams = as_noise(noise, x)
    rows = torch.arange(len(x), device=x.device)
    ascent = _Ascent(model, threat, _untargeted(loss), seek=False)
    best = torch.zeros_like(x)
    best_loss = lowest(x)
    with attack_mode(model, bn_mode):
        for run in range(restarts):
            start = _start(threat, x, streams.fold_in(run), random=random_start or run > 0, spread=spread)
            run_best, run_losses, _ = ascent.run(x, y, y, start, steps, share=0.05, rows=rows)
            best = choose(run_losses > best_loss, run_best, best)
            best_loss = torch.maximum(run_losses, best_loss)
    return x + best


def _stages(threat: Threat, steps: int, large_eps: bool) -> list[_Stage]:
    """The balls of one run, each with its number of steps; with `large_eps` those of 3, 2 and 1 times eps."""
    if not large_eps:
        return [(threat, steps)]
    third = steps * 3 // 10
    stages = [(3, third), (2, third), (1, steps - 2 * third)]
    return [(replace(threat, eps=factor * threat.eps), count) for factor, count in stages if count]


def _untargeted(loss: Loss) -> _TargetedLoss:
    """`loss`, or what takes its place in an attack, as a loss that ignores the target."""
    ascended = without_underflow(loss)

    def untargeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return ascended(logits, y)

    return untargeted


def _loss_and_targets(loss: str, clean: Tensor, y: Tensor, targets: int) -> tuple[_TargetedLoss, Tensor]:
    """The loss that is maximised, and each example's targets (N, T) in falling order of clean logits.

    A loss without a target has T = 1, and the labels in place of targets.
    """
    if loss in LOSSES:
        return _untargeted(LOSSES[loss]), y.unsqueeze(1)
    if loss != "targeted":
        raise ValueError(f"unknown loss {loss!r}: use one of {', '.join(LOSSES)}, targeted")
    classes = clean.shape[1]
    others = clean.scatter(1, y.unsqueeze(1), -torch.inf)
    ranked = others.topk(min(targets, classes - 1), dim=1)
    # a masked class (logit -inf) is no target: the best class takes its place
    chosen = torch.where(ranked.values > -torch.inf, ranked.indices, ranked.indices[:, :1])
    return targeted_dlr if classes >= 4 else targeted_margin, chosen


def _start(threat: Threat, x: Tensor, noise: Noise, *, random: bool, spread: float | None = None) -> Tensor:
    """The start of a run, like x: zero, random, or with `spread` normal noise of that standard deviation, projected.

    Under l1 a random start is N(0, I) projected onto the ball: such a point is sparse, as the best points are, and one
    that is uniform in the ball is not.
    """
    if random and threat.norm == "l1" and spread is None:
        spread = 1.0
    if spread is not None:
        return threat.project(x, spread * noise.normal(x[0].numel(), x.dtype).view_as(x))
    if not random:
        return torch.zeros_like(x)
    return threat.random_start_from(x, noise.uniform(x[0].numel() + 1, x.dtype))


def _run_stages(
    stages: Sequence[_Stage],
    model: nn.Module,
    targeted_loss: _TargetedLoss,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    delta: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One run through balls that shrink to the threat itself; see `_Ascent.run` for the results.

    Only in the last ball, which is the threat, does a point that fools the model count.
    """
    for number, (ball, steps) in enumerate(stages):
        ascent = _Ascent(model, ball, targeted_loss, seek=number == len(stages) - 1)
        share = None if number else 0.2
        delta, best_loss, zero_gradient = ascent.run(
            x, y, target, ball.project(x, delta), steps, share=share, rows=rows
        )
    return delta, best_loss, zero_gradient


@dataclass(frozen=True)
class _Ascent:
    """One run in one ball; with `seek`, a point that fools the model is the best point, whatever its loss."""

    model: nn.Module
    threat: Threat
    loss: _TargetedLoss
    seek: bool

    def run(
        self, x: Tensor, y: Tensor, target: Tensor, delta: Tensor, steps: int, *, share: float | None, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best delta, its loss (infinite where it fools), and whether the gradient was zero at every point.

        `rows`: the places of the examples in their batch. `share`: see `SparsitySchedule.begin`.
        """
        threat = self.threat
        walk = self._begin(x, y, target, delta, steps)
        schedule: StepSchedule
        if threat.norm == "l1":
            schedule = SparsitySchedule.begin(threat, walk, share)
        else:
            schedule = HalvingSchedule.begin(threat, walk)
        # results of all examples; `walk` holds only those that `alive` lists
        best = walk.best.clone()
        best_loss = walk.best_loss.clone()
        finite = walk.finite.clone()
        zero_gradient = walk.zero_gradient.clone()
        alive = torch.arange(len(x), device=x.device)
        last_checkpoint = 0
        all_checkpoints = {*checkpoints(threat, steps), steps}
        for step in range(1, steps + 1):
            walk = self._visit(walk, schedule.step(threat, walk, first=step == 1), step, final=step == steps)
            if step not in all_checkpoints:
                continue
            best[alive] = walk.best
            best_loss[alive] = walk.best_loss
            finite[alive] = walk.finite
            zero_gradient[alive] = walk.zero_gradient
            schedule, goes_back = schedule.update(walk, step - last_checkpoint)
            walk = walk.back_to_best(goes_back)
            last_checkpoint = step
            if self.seek:  # drop the examples that are fooled
                keep = (walk.best_loss < torch.inf).nonzero().flatten()
                walk = _select(walk, keep)
                schedule = _select(schedule, keep)
                threat = threat.select(keep)
                alive = alive[keep]
                if len(alive) == 0:
                    break
        require_finite(finite, steps + 1, rows)
        return best, best_loss, zero_gradient

    def _begin(self, x: Tensor, y: Tensor, target: Tensor, delta: Tensor, steps: int) -> Walk:
        """A walk that has visited its start `delta`."""
        no_gradient = torch.zeros_like(x)
        no_steps = torch.zeros_like(y)
        walk = Walk(
            x=x,
            y=y,
            target=target,
            delta=delta,
            previous=delta,
            grad=no_gradient,
            loss=lowest(x),
            best=delta,
            best_grad=no_gradient,
            best_loss=lowest(x),
            rises=no_steps,
            finite=no_steps + steps + 1,
            zero_gradient=no_steps == 0,
        )
        return replace(self._visit(walk, delta, 0, final=False), rises=no_steps)

    def _visit(self, walk: Walk, delta: Tensor, step: int, *, final: bool) -> Walk:
        """The walk after its move to `delta`. At the end of the run (`final`) no gradient is computed."""
        point = walk.x + delta
        if final:
            logits = scores(self.model, point)
            grad = walk.grad
            loss = self.loss(logits, walk.y, walk.target)
        else:
            grad, loss, logits = input_gradient(
                self.model, point, walk.y, lambda logits, y: self.loss(logits, y, walk.target)
            )
        largest = grad.flatten(1).abs().amax(1)  # (N,)
        is_finite = largest.isfinite() & loss.isfinite()
        value = torch.where(logits.argmax(1) != walk.y, torch.inf, loss) if self.seek else loss
        better = value > walk.best_loss
        return replace(
            walk,
            delta=delta,
            previous=walk.delta,
            grad=grad,
            loss=loss,
            best=choose(better, delta, walk.best),
            best_grad=choose(better, grad, walk.best_grad),
            best_loss=torch.where(better, value, walk.best_loss),
            rises=walk.rises + (loss > walk.loss),
            zero_gradient=walk.zero_gradient & (largest == 0),
            finite=torch.where(is_finite, walk.finite, walk.finite.clamp(max=step)),
        )


def _select(record: _Record, rows: Tensor) -> _Record:
    """The examples `rows` of a dataclass of tensors (N, ...); fields of other types stay."""
    selected = {}
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            selected[field.name] = value[rows]
    return replace(record, **selected)  # type: ignore[type-var]
