"""The description of attacks in a result: their parameters, and a text for tables."""

from __future__ import annotations

from poise.robust.spec import Threats, ThreatSpec
from poise.store.result import ResultModel

__all__ = ["AttackDescription", "describe_threats"]


class AttackDescription(ResultModel):
    """One attack of an evaluation. Lengths are in the norm of the ball, pixels in [0, 1]."""

    attack: str
    norm: str
    eps: float
    steps: int
    step_size: float | None
    restarts: int
    words: str


def describe_threats(threats: Threats) -> dict[str, AttackDescription]:
    """The attack under each norm."""
    return {norm: _describe(norm, threat) for norm, threat in threats.items()}


def _describe(norm: str, threat: ThreatSpec) -> AttackDescription:
    return AttackDescription(
        attack=threat.attack,
        norm=norm,
        eps=float(threat.eps),
        steps=threat.steps,
        step_size=None if threat.step_size is None else float(threat.step_size),
        restarts=threat.restarts,
        words=_words(threat),
    )


def _words(threat: ThreatSpec) -> str:
    runs = f"{threat.restarts} run{'s' if threat.restarts > 1 else ''}"
    if threat.attack == "apgd":
        return f"APGD-{threat.steps}, eps {threat.eps}, {runs}"
    step = "decaying steps" if threat.step_size is None else f"step {threat.step_size}"
    return f"PGD-{threat.steps}, eps {threat.eps}, {step}, {runs}"
