"""The section `objective` of a spec: what is minimised, on which threats it can be, and what it costs."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.robust.spec import NORMS, Norm, Threats
from poise.spec import Real, Section

__all__ = [
    "Adt",
    "At",
    "Avg",
    "Eat",
    "FgsmRs",
    "GradAlign",
    "Mart",
    "Max",
    "Mix",
    "Msd",
    "Objective",
    "Ramp",
    "Sat",
    "Trades",
    "check",
    "gradients_per_batch",
    "losses_per_batch",
]

_Weight = Annotated[Real, Field(ge=0, le=1_000)]
_Spread = Annotated[
    Annotated[Real, Field(gt=0, le=1)] | None,
    Field(description="standard deviation of the normal noise that the attack starts with; null: as the threat says"),
]
_Length = Annotated[Real, Field(gt=0, le=1_000_000)]


class At(Section):
    """Adversarial training on one threat."""

    name: Literal["at"] = Field(default="at", description="mean loss at the adversarial examples of one threat")


class Trades(Section):
    """Clean loss and the largest divergence from the clean prediction."""

    name: Literal["trades"] = Field(
        default="trades", description="clean loss plus beta times the divergence under attack"
    )
    beta: _Weight = Field(default=Real("6"), description="weight of the divergence")
    spread: _Spread = Real("0.001")


class Mart(Section):
    """Adversarial training that weighs misclassified examples more."""

    name: Literal["mart"] = Field(
        default="mart",
        description="boosted loss under attack plus beta times the divergence, weighed by the error on clean images",
    )
    beta: _Weight = Field(default=Real("5"), description="weight of the divergence")
    spread: _Spread = Real("0.001")


class Avg(Section):
    """Adversarial training on the mean of the threats."""

    name: Literal["avg"] = Field(default="avg", description="mean of the adversarial losses of all threats")
    mode: Literal["joint", "sequential"] = Field(
        default="joint", description="one optimizer step on the mean, or one per threat, attacked after the one before"
    )
    weights: dict[Norm, Annotated[Real, Field(ge=0, le=1)]] | None = Field(
        default=None, description="joint only: weight of each threat in the mean, by norm, summing to 1; default equal"
    )

    @model_validator(mode="after")
    def _sums_to_one(self) -> Avg:
        total = Fraction(sum(weight.exact for weight in self.weights.values())) if self.weights else Fraction(1)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"weights sum to 1, not {float(total):.6g}; fractions such as 1/3 are exact")
        if self.weights and self.mode == "sequential":
            raise ValueError("weights belong to mode `joint`: remove them, sequential steps are all of one size")
        return self


class Max(Section):
    """Adversarial training on the worst threat of each example."""

    name: Literal["max"] = Field(default="max", description="per example, the largest of the threats' losses")


class Sat(Section):
    """Adversarial training on one threat per batch, drawn evenly."""

    name: Literal["sat"] = Field(default="sat", description="loss under one threat, drawn evenly for each batch")


class Msd(Section):
    """Adversarial training on one attack whose every step goes the way of the worst threat."""

    name: Literal["msd"] = Field(default="msd", description="loss under one attack that chooses a norm at every step")
    steps: int = Field(default=50, ge=1, le=1000, description="steps of the attack; those of a threat are for tests")
    step_sizes: dict[Norm, _Length] | None = Field(
        default=None,
        description="length of a step in each threat's own norm; default 2.5 * eps / steps, at most eps",
    )


class Mix(Section):
    """Adversarial training on the mean of the threats' perturbations."""

    name: Literal["mix"] = Field(default="mix", description="loss at the mean of the threats' adversarial examples")


class Adt(Section):
    """Adversarial training with adaptive weights on the threats."""

    name: Literal["adt"] = Field(default="adt", description="weighted sum of the threats' losses, weights adapted")
    weighting: Literal["inverse_loss", "proportional_loss", "smoothness", "uniform", "official_slip"] = Field(
        default="inverse_loss",
        description="what the weights follow; official_slip repeats a slip of the authors' code, for replication only",
    )
    lag: Literal[0, 1] = Field(
        default=1, description="1: weigh a batch by what the batch before it showed; 0: by itself"
    )
    reset: Literal["epoch", "never"] = Field(default="epoch", description="when the weights start again from uniform")
    floor: Annotated[Real, Field(gt=0, le=1)] = Field(
        default=Real("1e-6"), description="smallest loss (or roughness) that a weight is computed from"
    )
    smoothness_decay: Annotated[Real, Field(ge=0, lt=1)] = Field(
        default=Real("0.9"), description="smoothness only: share of the old roughness that one batch keeps"
    )


class Eat(Section):
    """Adversarial training on one threat per batch, drawn by how often each has fooled the model."""

    name: Literal["eat"] = Field(
        default="eat", description="loss under one threat per batch, drawn in proportion to its robust error so far"
    )


class Ramp(Section):
    """Adversarial training on the worse of two threats, whose predictions are paired."""

    name: Literal["ramp"] = Field(
        default="ramp", description="worse loss of two threats plus the divergence between their predictions"
    )
    pairing: _Weight = Field(default=Real("5"), description="weight of the divergence; for fine-tuning 1.5")
    projection: Annotated[Real, Field(ge=0, le=1)] | None = Field(
        default=Real("1/2"),
        description="share of what natural epochs add: epochs then alternate, natural and adversarial, from the same "
        "weights; null: every epoch is adversarial",
    )


class FgsmRs(Section):
    """Fast adversarial training: one step from a random start."""

    name: Literal["fgsm_rs"] = Field(default="fgsm_rs", description="loss after one step from a random start")
    step: Annotated[Real, Field(gt=0, le=10)] = Field(
        default=Real("1.25"), description="length of the step in units of eps; the threat's own steps are for tests"
    )


class GradAlign(Section):
    """Fast adversarial training that keeps the input gradient aligned over the ball."""

    name: Literal["gradalign"] = Field(
        default="gradalign", description="adversarial loss plus what the input gradient turns within the ball"
    )
    attack: Literal["fgsm", "threat"] = Field(
        default="fgsm", description="fgsm: one step of length eps from the image; threat: the attack that it describes"
    )
    alignment: _Weight = Field(default=Real("0.2"), description="weight of 1 - cosine")


_Objective = At | Trades | Mart | Avg | Max | Sat | Msd | Mix | Adt | Eat | Ramp | FgsmRs | GradAlign
Objective = Annotated[_Objective, Field(discriminator="name")]

_SINGLE = (At, Trades, Mart, FgsmRs, GradAlign)
_EVENLY = (Sat, Eat)


def check(objective: _Objective, threats: Threats) -> None:
    """Raise `ValueError` when `objective` cannot be trained on `threats`."""
    given = ", ".join(threats.keys())
    if isinstance(objective, _SINGLE) and len(threats) != 1:
        raise ValueError(
            f"objective `{objective.name}` trains on exactly one threat and {len(threats)} are given ({given}): "
            "keep one, or use `avg`, `max` or `adt`"
        )
    if isinstance(objective, Ramp) and len(threats) != 2:
        raise ValueError(
            f"objective `ramp` pairs exactly two threats and {len(threats)} are given ({given}): give linf and l1, "
            "which between them cover l2"
        )
    if isinstance(objective, Adt) and objective.weighting == "official_slip" and len(threats) != len(NORMS):
        raise ValueError("weighting `official_slip` is defined for the three threats linf, l2 and l1: give all three")
    _check_norms("weights", objective.weights if isinstance(objective, Avg) else None, threats)
    _check_norms("step_sizes", objective.step_sizes if isinstance(objective, Msd) else None, threats)
    _check_attacks(objective, threats)


def _check_norms(what: str, by_norm: dict[Norm, Real] | None, threats: Threats) -> None:
    given = threats.keys()
    if by_norm and set(by_norm) != set(given):
        raise ValueError(
            f"{what} are given for {', '.join(by_norm)} and threats for {', '.join(given)}: name the same norms"
        )


def _check_attacks(objective: _Objective, threats: Threats) -> None:
    own = isinstance(objective, FgsmRs) or (isinstance(objective, GradAlign) and objective.attack == "fgsm")
    for norm, threat in threats.items():
        if threat.attack == "apgd" and own:
            raise ValueError(f"`{objective.name}` trains with one step of its own: remove threats.{norm}.attack")
        if isinstance(objective, (Trades, Mart)):
            if threat.attack == "apgd" and objective.spread is not None:
                raise ValueError(f"a spread is for pgd: set objective.spread: null, or remove threats.{norm}.attack")
            if isinstance(objective, Trades) and objective.spread is None and not threat.options()["random_start"]:
                raise ValueError(
                    "the attack of `trades` would stay at the image, where the divergence has no gradient: "
                    f"give objective.spread, or set threats.{norm}.random_start: true"
                )


def gradients_per_batch(objective: _Objective, threats: Threats) -> int:
    """Input gradients that the attacks of one training batch take, in the mean over the batches of a run.

    The sum of steps times restarts; of one threat's share where one is drawn per batch (for `eat` before it has seen
    which), of every second batch where natural epochs alternate, and of all optimizer steps on a batch for sequential
    `avg`. `gradalign` takes two more for its angle.
    """
    check(objective, threats)
    every = sum(threat.steps * threat.restarts for _, threat in threats.items())
    if isinstance(objective, _EVENLY):
        return round(every / len(threats))
    if isinstance(objective, Ramp) and objective.projection is not None:
        return round(every / 2)
    if isinstance(objective, Msd):
        return objective.steps
    if isinstance(objective, FgsmRs):
        return 1
    if isinstance(objective, GradAlign):
        return 2 + (1 if objective.attack == "fgsm" else every)
    return every


def losses_per_batch(objective: _Objective, threats: Threats) -> int:
    """Training forwards of one batch, after its attacks."""
    if isinstance(objective, GradAlign):
        return 3
    if isinstance(objective, (Trades, Mart)):
        return 2
    return 1 if isinstance(objective, (Sat, Eat, Msd, Mix)) else len(threats)
