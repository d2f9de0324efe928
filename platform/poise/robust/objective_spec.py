"""The section `objective` of a spec: what is minimised, on which threats it can be, and what it costs."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.robust.spec import NORMS, Norm, Threats
from poise.spec import Real, Section

__all__ = ["Adt", "At", "Avg", "Max", "Objective", "check", "gradients_per_batch"]


class At(Section):
    """Adversarial training on one threat."""

    name: Literal["at"] = Field(default="at", description="mean loss at the adversarial examples of one threat")


class Avg(Section):
    """Adversarial training on the mean of the threats."""

    name: Literal["avg"] = Field(default="avg", description="mean of the adversarial losses of all threats")
    weights: dict[Norm, Annotated[Real, Field(ge=0, le=1)]] | None = Field(
        default=None, description="weight of each threat in the mean, by norm, summing to 1; default equal"
    )

    @model_validator(mode="after")
    def _sums_to_one(self) -> Avg:
        total = Fraction(sum(weight.exact for weight in self.weights.values())) if self.weights else Fraction(1)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"weights sum to 1, not {float(total):.6g}; fractions such as 1/3 are exact")
        return self


class Max(Section):
    """Adversarial training on the worst threat of each example."""

    name: Literal["max"] = Field(default="max", description="per example, the largest of the threats' losses")


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


Objective = Annotated[At | Avg | Max | Adt, Field(discriminator="name")]


def check(objective: At | Avg | Max | Adt, threats: Threats) -> None:
    """Raise `ValueError` when `objective` cannot be trained on `threats`."""
    if isinstance(objective, At) and len(threats) != 1:
        raise ValueError(
            f"objective `at` trains on exactly one threat and {len(threats)} are given ({', '.join(threats.keys())}): "
            "keep one, or use `avg`, `max` or `adt`"
        )
    if isinstance(objective, Avg) and objective.weights and set(objective.weights) != set(threats.keys()):
        raise ValueError(
            f"weights are given for {', '.join(objective.weights)} and threats for {', '.join(threats.keys())}: "
            "name the same norms"
        )
    if isinstance(objective, Adt) and objective.weighting == "official_slip" and len(threats) != len(NORMS):
        raise ValueError("weighting `official_slip` is defined for the three threats linf, l2 and l1: give all three")


def gradients_per_batch(objective: At | Avg | Max | Adt, threats: Threats) -> int:
    """Input gradients that the attacks of one training batch take: the sum of steps times restarts."""
    check(objective, threats)
    return sum(threat.steps * threat.restarts for _, threat in threats.items())
