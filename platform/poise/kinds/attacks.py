"""From the stages of a spec to attacks: what each is called, whom it attacks, what it does, and that in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from poise.errors import UserError
from poise.kinds.specs.evaluation import (
    ApgdStage,
    AutoAttackStage,
    BallSpec,
    FabStage,
    MsdStage,
    PgdStage,
    Stage,
    threat_names,
)
from poise.robust.attacks import LOSSES, AttackResult, AveragedModel, apgd, fab, msd, pgd, square
from poise.robust.attacks.autoattack import rand_stages
from poise.robust.attacks.autoattack import stages as standard
from poise.robust.evaluate import EvaluationAttack
from poise.robust.noise import Noise
from poise.robust.threats import Threat

__all__ = ["BoundStage", "bind", "bound", "threat_names"]


@dataclass(frozen=True)
class BoundStage:
    """One stage, ready to run.

    `threats` are the columns of the balls that the attack may use: it is tried on what stands under all of them. One
    that is a `black_box` sees no gradient.
    """

    name: str
    threats: tuple[str, ...]
    attack: EvaluationAttack
    words: str
    black_box: bool = False

    @property
    def column(self) -> str:
        """The threat that its verdict counts for: one ball, or a union of several."""
        return "+".join(self.threats)


def bound(
    attack: Callable[..., AttackResult], threat: Threat | Mapping[str, Threat], **options: Any
) -> EvaluationAttack:
    """An attack of the robust room with all but the images bound."""

    def attacked(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
        return attack(model, x, y, threat, noise=noise, **options)

    return attacked


def bind(stages: Sequence[Stage], num_classes: int, batch_size: int | None = None) -> list[BoundStage]:
    """Every stage in order, for a model of so many classes. UserError where one cannot attack such a model.

    Runs towards several targets share batches of up to `batch_size` where few examples stand, with the same result.
    """
    names = threat_names(stages)
    try:
        return [one for stage in stages for one in _bound(stage, names, num_classes, batch_size)]
    except ValueError as error:
        raise UserError(f"attacks: {error}") from None


def _bound(stage: Stage, names: dict[BallSpec, str], num_classes: int, batch_size: int | None) -> Iterator[BoundStage]:
    """What a stage of the spec runs: itself, or the attacks that it stands for."""
    threats: dict[str, Threat] = {ball.norm: Threat(ball.norm, ball.eps) for ball in stage.balls}
    if isinstance(stage, AutoAttackStage):
        sequence = rand_stages if stage.version == "rand" else standard
        parts = chain.from_iterable(
            ((ball, part) for part in sequence(threats[ball.norm], num_classes, batch_size)) for ball in stage.balls
        )
        for key, (ball, part) in zip(stage.keys, parts, strict=True):
            options = dict(part.options) if stage.draws is None else {**part.options, "draws": stage.draws}
            words = ", ".join([f"AutoAttack {part.name}", f"eps {ball.eps}", *(f"{k} {v}" for k, v in options.items())])
            yield BoundStage(key, (names[ball],), _averaged(part, stage.draws), words, part.name == "square")
        return
    faced = threats if isinstance(stage, MsdStage) else threats[stage.threat.norm]
    shared = {"batch_size": batch_size} if isinstance(stage, ApgdStage | FabStage) else {}
    attack = bound(_ATTACKS[stage.attack], faced, **stage.options(), **shared)
    if isinstance(stage, PgdStage | ApgdStage):
        attack = _averaged(attack, stage.draws)
    yield BoundStage(
        stage.keys[0], tuple(names[b] for b in stage.balls), attack, stage.words(), stage.attack == "square"
    )


def _averaged(attack: EvaluationAttack, draws: int | None) -> EvaluationAttack:
    """The attack on the mean prediction of the model over so many draws; None: on the model itself."""
    if draws is None:
        return attack

    def attacked(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
        return attack(AveragedModel(model, draws), x, y, noise)

    return attacked


def _fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, noise: Noise) -> AttackResult:
    return pgd(model, x, y, threat, steps=1, step_size=threat.eps, random_start=False, noise=noise)


def _pgd(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, loss: str, **options: Any) -> AttackResult:
    return pgd(model, x, y, threat, loss=LOSSES[loss], **options)


_ATTACKS: dict[str, Callable[..., AttackResult]] = {
    "fgsm": _fgsm,
    "pgd": _pgd,
    "apgd": apgd,
    "fab": fab,
    "square": square,
    "msd": msd,
}
