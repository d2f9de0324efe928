"""From the stages of a spec to attacks: what each is called, whom it attacks, what it does, and that in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from poise.errors import UserError
from poise.kinds.specs.evaluation import BallSpec, FgsmStage, PgdStage, Stage
from poise.robust.attacks import LOSSES, AttackResult, pgd
from poise.robust.evaluate import EvaluationAttack
from poise.robust.noise import Noise
from poise.robust.spec import ThreatSpec
from poise.robust.threats import Threat

__all__ = ["BoundStage", "bind", "bound", "search_words", "threat_names"]


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


def bound(attack: Callable[..., AttackResult], threat: Threat, **options: Any) -> EvaluationAttack:
    """An attack of the robust room with all but the images bound."""

    def attacked(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
        return attack(model, x, y, threat, noise=noise, **options)

    return attacked


def search_words(threat: ThreatSpec) -> str:
    """Gradient ascent for tables and pages, eps as it was written."""
    if threat.attack == "apgd":
        return f"APGD-{threat.steps}, eps {threat.eps}, {_runs(threat.restarts)}"
    step = threat.step_size or f"{min(2.5 * threat.eps / threat.steps, threat.eps):.4g}"
    return f"PGD-{threat.steps}, eps {threat.eps}, step {step}, {_runs(threat.restarts)}"


def threat_names(stages: Sequence[Stage]) -> dict[BallSpec, str]:
    """A column for each ball: its norm, with its radius where several balls share that."""
    balls = list(dict.fromkeys(ball for stage in stages for ball in stage.balls))
    norms = [ball.norm for ball in balls]
    return {ball: ball.norm if norms.count(ball.norm) == 1 else f"{ball.norm} {ball.eps}" for ball in balls}


def bind(stages: Sequence[Stage], num_classes: int) -> list[BoundStage]:
    """Every stage in order, for a model of so many classes. UserError where one cannot attack such a model."""
    names = threat_names(stages)
    try:
        return [one for stage in stages for one in _bound(stage, names, num_classes)]
    except ValueError as error:
        raise UserError(f"attacks: {error}") from None


def _bound(stage: Stage, names: dict[BallSpec, str], num_classes: int) -> Iterator[BoundStage]:
    ball = Threat(stage.threat.norm, stage.threat.eps)
    one = partial(BoundStage, stage.key, (names[stage.threat],))
    match stage:
        case FgsmStage():
            attack = bound(pgd, ball, steps=1, step_size=float(ball.eps), random_start=False)
            yield one(attack, f"FGSM, eps {stage.threat.eps}")
        case PgdStage():
            search = stage.search()
            attack = bound(pgd, ball, loss=LOSSES[stage.loss], **search.options())
            yield one(attack, f"{search_words(search)}, {stage.loss}")


def _runs(count: int) -> str:
    return f"{count} run{'s' if count > 1 else ''}"
