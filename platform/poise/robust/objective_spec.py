"""The section `objective` of a spec: its options, the threats that it can be trained on, and its cost."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.robust.spec import NORMS, Norm, Threats
from poise.spec import ExactNumber, SpecModel

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

_Weight = Annotated[ExactNumber, Field(ge=0, le=1_000)]
_Spread = Annotated[
    Annotated[ExactNumber, Field(gt=0, le=1)] | None,
    Field(description="standard deviation of the normal noise that the attack starts with; null: as the threat says"),
]
_Length = Annotated[ExactNumber, Field(gt=0, le=1_000_000)]


class At(SpecModel):
    """Adversarial training on one threat."""

    name: Literal["at"] = Field(default="at", description="mean loss at the adversarial examples of one threat")


class Trades(SpecModel):
    """Clean loss plus the largest divergence from the clean prediction."""

    name: Literal["trades"] = Field(
        default="trades", description="clean loss plus beta times the divergence under attack"
    )
    beta: _Weight = Field(default=ExactNumber("6"), description="weight of the divergence")
    spread: _Spread = ExactNumber("0.001")


class Mart(SpecModel):
    """Adversarial training that weighs misclassified examples more."""

    name: Literal["mart"] = Field(
        default="mart",
        description="boosted loss under attack plus beta times the divergence, weighed by the error on clean images",
    )
    beta: _Weight = Field(default=ExactNumber("5"), description="weight of the divergence")
    spread: _Spread = ExactNumber("0.001")


class Avg(SpecModel):
    """Adversarial training on the mean of the threats."""

    name: Literal["avg"] = Field(default="avg", description="mean of the adversarial losses of all threats")
    mode: Literal["joint", "sequential"] = Field(
        default="joint", description="one optimizer step on the mean, or one per threat, attacked after the one before"
    )
    weights: dict[Norm, Annotated[ExactNumber, Field(ge=0, le=1)]] | None = Field(
        default=None,
        description="joint only: weight of each threat in the mean, by norm, summing to 1; default: equal weights",
    )

    @model_validator(mode="after")
    def _sums_to_one(self) -> Avg:
        if not self.weights:
            return self
        total = Fraction(sum(weight.exact for weight in self.weights.values()))
        if abs(total - 1) > 1e-6:
            raise ValueError(f"weights sum to 1, not {float(total):.6g}; fractions such as 1/3 are exact")
        if self.mode == "sequential":
            raise ValueError("weights belong to mode `joint`: remove them, sequential steps are all of one size")
        return self


class Max(SpecModel):
    """Adversarial training on the worst threat of each example."""

    name: Literal["max"] = Field(default="max", description="per example, the largest of the threats' losses")


class Sat(SpecModel):
    """Adversarial training on one threat per batch, drawn evenly."""

    name: Literal["sat"] = Field(default="sat", description="loss under one threat, drawn evenly for each batch")


class Msd(SpecModel):
    """Adversarial training on one attack each of whose steps is that of the worst threat."""

    name: Literal["msd"] = Field(default="msd", description="loss under one attack that chooses a norm at every step")
    steps: int = Field(
        default=50, ge=1, le=1000, description="steps of the attack; the `steps` of a threat are for tests"
    )
    step_sizes: dict[Norm, _Length] | None = Field(
        default=None,
        description="length of a step in each threat's own norm; default 2.5 * eps / steps, at most eps",
    )


class Mix(SpecModel):
    """Adversarial training on the mean of the threats' perturbations."""

    name: Literal["mix"] = Field(default="mix", description="loss at the mean of the threats' adversarial examples")


class Adt(SpecModel):
    """Adversarial training with adaptive weights on the threats."""

    name: Literal["adt"] = Field(default="adt", description="weighted sum of the threats' losses, weights adapted")
    weighting: Literal["inverse_loss", "proportional_loss", "smoothness", "uniform", "official_slip"] = Field(
        default="inverse_loss",
        description="rule of the weights; official_slip repeats a slip of the authors' code, for replication only",
    )
    lag: Literal[0, 1] = Field(
        default=1, description="1: weigh a batch by the losses of the batch before it; 0: by its own losses"
    )
    reset: Literal["epoch", "never"] = Field(default="epoch", description="when the weights go back to uniform")
    floor: Annotated[ExactNumber, Field(gt=0, le=1)] = Field(
        default=ExactNumber("1e-6"),
        description="losses (or roughnesses) below this count as this when weights are computed",
    )
    smoothness_decay: Annotated[ExactNumber, Field(ge=0, lt=1)] = Field(
        default=ExactNumber("0.9"), description="smoothness only: decay of the moving average of the roughness"
    )


class Eat(SpecModel):
    """Adversarial training on one threat per batch, drawn in proportion to its robust error so far."""

    name: Literal["eat"] = Field(
        default="eat", description="loss under one threat per batch, drawn in proportion to its robust error so far"
    )


class Ramp(SpecModel):
    """Adversarial training on the worse of two threats, plus the divergence between their predictions."""

    name: Literal["ramp"] = Field(
        default="ramp", description="worse loss of two threats plus the divergence between their predictions"
    )
    kl_weight: _Weight = Field(default=ExactNumber("5"), description="weight of the divergence; for fine-tuning 1.5")
    projection: Annotated[ExactNumber, Field(ge=0, le=1)] | None = Field(
        default=ExactNumber("1/2"),
        description="weight of natural training in the update: natural and adversarial epochs alternate, from the "
        "same weights; null: every epoch is adversarial",
    )


class FgsmRs(SpecModel):
    """Fast adversarial training: one step from a random start."""

    name: Literal["fgsm_rs"] = Field(default="fgsm_rs", description="loss after one step from a random start")
    step: Annotated[ExactNumber, Field(gt=0, le=10)] = Field(
        default=ExactNumber("1.25"),
        description="length of the step in units of eps; the `steps` of the threat are for tests",
    )


class GradAlign(SpecModel):
    """Fast adversarial training that keeps the input gradient aligned over the ball."""

    name: Literal["gradalign"] = Field(
        default="gradalign", description="adversarial loss plus 1 - cosine between input gradients within the ball"
    )
    attack: Literal["fgsm", "threat"] = Field(
        default="fgsm", description="fgsm: one step of length eps from the image; threat: the attack of the threat"
    )
    alignment: _Weight = Field(default=ExactNumber("0.2"), description="weight of 1 - cosine")


_Objective = At | Trades | Mart | Avg | Max | Sat | Msd | Mix | Adt | Eat | Ramp | FgsmRs | GradAlign
Objective = Annotated[_Objective, Field(discriminator="name")]

_SINGLE = (At, Trades, Mart, FgsmRs, GradAlign)
_ONE_THREAT_PER_BATCH = (Sat, Eat)


def check(objective: _Objective, threats: Threats) -> None:
    """Raise `ValueError` when `objective` cannot be trained on `threats`."""
    norms = ", ".join(threats.keys())
    if isinstance(objective, _SINGLE) and len(threats) != 1:
        raise ValueError(
            f"objective `{objective.name}` trains on exactly one threat and {len(threats)} are given ({norms}): "
            "keep one, or use `avg`, `max` or `adt`"
        )
    if isinstance(objective, Ramp) and len(threats) != 2:
        raise ValueError(
            f"objective `ramp` pairs exactly two threats and {len(threats)} are given ({norms}): give linf and l1, "
            "which between them cover l2"
        )
    if isinstance(objective, Adt) and objective.weighting == "official_slip" and len(threats) != len(NORMS):
        raise ValueError("weighting `official_slip` is defined for the three threats linf, l2 and l1: give all three")
    _check_norms("weights", objective.weights if isinstance(objective, Avg) else None, threats)
    _check_norms("step_sizes", objective.step_sizes if isinstance(objective, Msd) else None, threats)
    _check_attacks(objective, threats)


def _check_norms(what: str, by_norm: dict[Norm, ExactNumber] | None, threats: Threats) -> None:
    norms = threats.keys()
    if by_norm and set(by_norm) != set(norms):
        raise ValueError(
            f"{what} are given for {', '.join(by_norm)} and threats for {', '.join(norms)}: name the same norms"
        )


def _check_attacks(objective: _Objective, threats: Threats) -> None:
    fixes_attack = isinstance(objective, FgsmRs) or (isinstance(objective, GradAlign) and objective.attack == "fgsm")
    for norm, threat in threats.items():
        if threat.attack == "apgd" and fixes_attack:
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
    """Input gradients that the attacks take per training batch, on average over the batches of a run.

    The sum over threats of steps times restarts. Where one threat is drawn per batch, it is the mean over threats (for
    `eat`, whose probabilities are not known before). Where natural epochs alternate with adversarial ones, it is half.
    For sequential `avg` it counts all optimizer steps on a batch. `gradalign` takes two more gradients for its angle.
    """
    check(objective, threats)
    all_threats = sum(threat.steps * threat.restarts for _, threat in threats.items())
    if isinstance(objective, _ONE_THREAT_PER_BATCH):
        return round(all_threats / len(threats))
    if isinstance(objective, Ramp) and objective.projection is not None:
        return round(all_threats / 2)
    if isinstance(objective, Msd):
        return objective.steps
    if isinstance(objective, FgsmRs):
        return 1
    if isinstance(objective, GradAlign):
        return 2 + (1 if objective.attack == "fgsm" else all_threats)
    return all_threats


def losses_per_batch(objective: _Objective, threats: Threats) -> int:
    """Training forwards of one batch, without those of its attacks."""
    if isinstance(objective, GradAlign):
        return 3
    if isinstance(objective, (Trades, Mart)):
        return 2
    return 1 if isinstance(objective, (Sat, Eat, Msd, Mix)) else len(threats)
