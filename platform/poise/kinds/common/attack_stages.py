"""From the stages of a spec to attacks with their names, threats and descriptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from poise.errors import UserError
from poise.kinds.common.attack_spec import (
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
from poise.robust.attacks.autoattack import stages as standard_stages
from poise.robust.evaluate import EvaluationAttack
from poise.robust.noise import Noise
from poise.robust.threats import Threat

__all__ = ["BoundStage", "bind", "bind_attack", "threat_names"]


@dataclass(frozen=True)
class BoundStage:
    """One stage, ready to run.

    Attributes:
        name: in paths and columns.
        threats: columns of the balls that the attack may use. It attacks the examples still correct under all of them.
        attack: the attack with all arguments bound but model, images, labels and noise.
        words: the attack as text.
        black_box: it uses no gradient.
    """

    name: str
    threats: tuple[str, ...]
    attack: EvaluationAttack
    words: str
    black_box: bool = False

    @property
    def column(self) -> str:
        """The threat that its result counts for: one ball, or a union of several."""
        return "+".join(self.threats)


def bind_attack(
    attack: Callable[..., AttackResult], threat: Threat | Mapping[str, Threat], **options: Any
) -> EvaluationAttack:
    """An attack of `robust.attacks` with its threat and options bound."""

    def bound_attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
        return attack(model, x, y, threat, noise=noise, **options)

    return bound_attack


def bind(stages: Sequence[Stage], num_classes: int, batch_size: int | None = None) -> list[BoundStage]:
    """Every stage in order, for a model with `num_classes` classes.

    Targeted attacks on few examples put several targets into one batch of up to `batch_size`, with the same result.

    Raises:
        UserError: an attack cannot be applied to such a model.
    """
    names = threat_names(stages)
    bound_stages: list[BoundStage] = []
    try:
        for stage in stages:
            if isinstance(stage, AutoAttackStage):
                bound_stages += _bind_autoattack(stage, names, num_classes, batch_size)
            else:
                bound_stages.append(_bind_stage(stage, names, batch_size))
    except ValueError as error:
        raise UserError(f"attacks: {error}") from None
    return bound_stages


def _bind_autoattack(
    stage: AutoAttackStage, names: dict[BallSpec, str], num_classes: int, batch_size: int | None
) -> Iterator[BoundStage]:
    """The attacks of AutoAttack, under one ball after the other."""
    stages_of = rand_stages if stage.version == "rand" else standard_stages
    keys = iter(stage.keys)  # ball by ball, in the order of the attacks
    for ball in stage.balls:
        for part in stages_of(Threat(ball.norm, ball.eps), num_classes, batch_size):
            options = dict(part.options)
            if stage.draws is not None:
                options["draws"] = stage.draws
            option_texts = [f"{key} {value}" for key, value in options.items()]
            words = ", ".join([f"AutoAttack {part.name}", f"eps {ball.eps}", *option_texts])
            yield BoundStage(
                next(keys), (names[ball],), _average_draws(part, stage.draws), words, black_box=part.name == "square"
            )


def _bind_stage(stage: Stage, names: dict[BallSpec, str], batch_size: int | None) -> BoundStage:
    """One attack under one ball, or MSD under the union of several."""
    threats: dict[str, Threat] = {ball.norm: Threat(ball.norm, ball.eps) for ball in stage.balls}
    threat: Threat | Mapping[str, Threat] = threats if isinstance(stage, MsdStage) else next(iter(threats.values()))
    batch_options = {"batch_size": batch_size} if isinstance(stage, ApgdStage | FabStage) else {}
    attack = bind_attack(_ATTACKS[stage.attack], threat, **stage.options(), **batch_options)
    if isinstance(stage, PgdStage | ApgdStage):
        attack = _average_draws(attack, stage.draws)
    columns = tuple(names[ball] for ball in stage.balls)
    return BoundStage(stage.keys[0], columns, attack, stage.words(), black_box=stage.attack == "square")


def _average_draws(attack: EvaluationAttack, draws: int | None) -> EvaluationAttack:
    """The attack on the mean prediction of a randomised model over `draws` draws; with None, the attack itself."""
    if draws is None:
        return attack

    def attack_mean(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
        return attack(AveragedModel(model, draws), x, y, noise)

    return attack_mean


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
