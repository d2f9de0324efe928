"""The robust sections of a spec: what the adversary may do, what is minimised, how robustness is measured.

Step sizes are lengths in the norm of their own threat, so that one default serves all three: an l1 step of length `s`
over `k` coordinates moves each by `s / k`. (In the convention "alpha * 20 / k per coordinate" of the multi-norm codes,
alpha = 0.05 is a step of length 1 here.)
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from poise.spec import Real, Section

__all__ = [
    "NORMS",
    "Adt",
    "At",
    "Avg",
    "EvaluateSpec",
    "Max",
    "Norm",
    "Objective",
    "Sparsity",
    "ThreatSpec",
    "Threats",
    "check",
    "gradients_per_batch",
]

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
Sparsity = int | tuple[int, int]


def _sparsity(value: Sparsity) -> Sparsity:
    low, high = (value, value) if isinstance(value, int) else value
    if not 1 <= low <= high <= 1_000_000:
        raise ValueError("expected a count of coordinates, or a range [low, high] with 1 <= low <= high <= 1000000")
    return value


def _pair(value: Any) -> Any:
    """YAML has lists only; a range is kept as a tuple because a section is immutable."""
    return tuple(value) if isinstance(value, list) else value


class ThreatSpec(Section):
    """One ball around an image and the projected gradient ascent that searches it."""

    eps: Annotated[Real, Field(ge=0, le=1_000_000)] = Field(
        description="radius of the ball in its own norm, pixels in [0, 1]; a fraction such as 8/255 is read exactly"
    )
    steps: int = Field(default=10, ge=1, le=1000, description="gradient steps of one run of the attack")
    step_size: Annotated[Real, Field(gt=0, le=1_000_000)] | None = Field(
        default=None, description="length of a step in the threat's norm; default 2.5 * eps / steps, at most eps"
    )
    restarts: int = Field(
        default=1, ge=1, le=1000, description="runs of the attack; those after the first start at random"
    )
    random_start: bool = Field(default=True, description="start the first run at random in the ball, not at the image")
    sparsity: Annotated[Sparsity, BeforeValidator(_pair), AfterValidator(_sparsity)] | None = Field(
        default=None,
        description="l1 only: coordinates that a step moves, a count or a range [low, high]; default [5, 20]",
    )

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `attacks.pgd` and `attacks.perturb` that this section decides."""
        return {
            "steps": self.steps,
            "step_size": None if self.step_size is None else float(self.step_size),
            "restarts": self.restarts,
            "random_start": self.random_start,
            "sparsity": self.sparsity or (5, 20),
        }


class Threats(Section):
    """The threats that a model faces; a mapping from norm to `ThreatSpec`, always in the order linf, l2, l1."""

    linf: ThreatSpec | None = Field(default=None, description="every pixel changes by at most eps")
    l2: ThreatSpec | None = Field(default=None, description="the Euclidean length of the change is at most eps")
    l1: ThreatSpec | None = Field(default=None, description="the absolute changes of all pixels sum to at most eps")

    @model_validator(mode="after")
    def _some_and_sound(self) -> Threats:
        if not self.keys():
            raise ValueError("at least one threat is needed: linf, l2 or l1, for example `linf: {eps: 8/255}`")
        for norm, threat in self.items():
            if threat.sparsity is not None and norm != "l1":
                raise ValueError(f"sparsity belongs to l1 alone: remove it from {norm}")
        return self

    def keys(self) -> tuple[Norm, ...]:
        return tuple(norm for norm in NORMS if getattr(self, norm) is not None)

    def __getitem__(self, norm: Norm) -> ThreatSpec:
        threat: ThreatSpec | None = getattr(self, norm) if norm in NORMS else None
        if threat is None:
            raise KeyError(norm)
        return threat

    def items(self) -> Iterator[tuple[Norm, ThreatSpec]]:
        return ((norm, self[norm]) for norm in self.keys())

    def __len__(self) -> int:
        return len(self.keys())


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


class EvaluateSpec(Section):
    """How robustness is measured: projected gradient ascent under each threat, and their union."""

    threats: Threats | None = Field(
        default=None, description="threats of the test; default, and always on the validation split, those of training"
    )
    examples: int | None = Field(default=None, ge=1, description="examples to evaluate, from the first; default all")
    batch_size: int = Field(
        default=256, ge=1, le=65_536, description="examples attacked at once; the result does not hang on it"
    )


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
