"""The robust sections of a spec: the threats, and how robustness is measured.

Step sizes are lengths in the norm of their own threat, so that one default serves all three: an l1 step of length `s`
over `k` coordinates moves each by `s / k`. (In the convention "alpha * 20 / k per coordinate" of the multi-norm codes,
alpha = 0.05 is a step of length 1 here.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from poise.robust.step_sizes import DECAYING_STEPS, DEFAULT_SPARSITY, TRAINING_STEP
from poise.spec import ExactNumber, ExtraMetrics, SpecModel, field_error

__all__ = [
    "DEFAULT_TARGETS",
    "NORMS",
    "Coordinates",
    "Eigenspace",
    "Eps",
    "EvaluateSpec",
    "Norm",
    "Sparsity",
    "StepSize",
    "ThreatSpec",
    "Threats",
    "check_steps",
    "oversized",
]

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
Sparsity = int | tuple[int, int]

DEFAULT_TARGETS = 9
"""How many of the likeliest wrong classes a targeted attack tries."""


def _sparsity(value: Sparsity) -> Sparsity:
    low, high = (value, value) if isinstance(value, int) else value
    if not 1 <= low <= high <= 1_000_000:
        raise ValueError("expected a count of coordinates, or a range [low, high] with 1 <= low <= high <= 1000000")
    return value


def _pair(value: Any) -> Any:
    """A range as a tuple, because a section is immutable; YAML has lists only."""
    return tuple(value) if isinstance(value, list) else value


def oversized(norm: Norm, eps: float, dimensions: int | None, key: str = "eps") -> str | None:
    """Why this radius is too large, or None: no two images of so many values in [0, 1] are that far apart.

    Without `dimensions` only linf has a limit. `key` is the name of the length in the message, if it is not a radius.
    """
    if norm == "linf":
        limit = 1.0
    elif dimensions is None:
        return None
    else:
        limit = math.sqrt(dimensions) if norm == "l2" else float(dimensions)
    if eps <= limit * (1 + 1e-9):
        return None
    return (
        f"{key} {eps:g} is more than the {norm} distance of any two images, {limit:.4g}: pixels are in [0, 1], so that "
        f"{eps:g} of 255 grey levels is {eps:g}/255"
    )


Eps = Annotated[ExactNumber, Field(ge=0, le=1_000_000)]
"""The radius of a ball in its own norm."""

StepSize = Annotated[ExactNumber, Field(gt=0, le=1_000_000)]
"""The length of a step in the norm of the threat."""

Coordinates = Annotated[
    Annotated[Sparsity, BeforeValidator(_pair), AfterValidator(_sparsity)] | None,
    Field(
        description="l1 only: coordinates that a step moves, a count or a range [low, high]; default "
        f"{list(DEFAULT_SPARSITY)}"
    ),
]
"""How many coordinates one l1 step moves: a count, or a range as a list of two in YAML; None for the default."""


def check_steps(norm: Norm, step_size: ExactNumber | None, sparsity: Sparsity | None, section: str = "") -> None:
    """Raise a `field_error` for steps that projected gradient ascent cannot take in this norm.

    `section` is the path of the section with the keys, with a dot at its end.
    """
    if step_size is not None and (problem := oversized(norm, float(step_size), None, "step_size")):
        raise field_error(f"{section}step_size", problem)
    if sparsity is not None and norm != "l1":
        raise field_error(f"{section}sparsity", f"sparsity belongs to l1 alone: remove it from {norm}")


class ThreatSpec(SpecModel):
    """One ball around an image and the projected gradient ascent that searches it."""

    attack: Literal["pgd", "apgd"] = Field(
        default="pgd", description="pgd: steps of one length; apgd: Auto-PGD, which chooses its steps itself"
    )
    eps: Eps = Field(
        description="radius of the ball in its own norm, pixels in [0, 1]; a fraction such as 8/255 is read exactly"
    )
    steps: int = Field(default=10, ge=1, le=1000, description="gradient steps of one run of the attack")
    step_size: StepSize | None = Field(
        default=None,
        description=f"length of a step in the threat's norm; default: in training {TRAINING_STEP}; in tests, "
        f"{DECAYING_STEPS}",
    )
    restarts: int = Field(
        default=1, ge=1, le=1000, description="runs of the attack; those after the first start at random"
    )
    random_start: bool | None = Field(
        default=None,
        description="start the first run at random in the ball, not at the image; default true for pgd, false for apgd",
    )
    sparsity: Coordinates = None

    @property
    def starts_at_random(self) -> bool:
        """Whether the first run starts at a random point of the ball."""
        return self.attack == "pgd" if self.random_start is None else self.random_start

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the attack that this section sets; the others keep the defaults of the attack."""
        options: dict[str, Any] = {
            "steps": self.steps,
            "restarts": self.restarts,
            "random_start": self.starts_at_random,
        }
        if self.step_size is not None:
            options["step_size"] = float(self.step_size)
        if self.sparsity is not None:
            options["sparsity"] = self.sparsity
        return options

    @model_validator(mode="after")
    def _no_steps_for_apgd(self) -> ThreatSpec:
        step_keys = [key for key in ("step_size", "sparsity") if getattr(self, key) is not None]
        if self.attack == "apgd" and step_keys:
            raise ValueError(f"apgd chooses its own steps: remove {' and '.join(step_keys)}, or use `attack: pgd`")
        return self


class Threats(SpecModel):
    """The threats to a model: a mapping from norm to `ThreatSpec`, always in the order linf, l2, l1."""

    linf: ThreatSpec | None = Field(default=None, description="every pixel changes by at most eps")
    l2: ThreatSpec | None = Field(default=None, description="the Euclidean length of the change is at most eps")
    l1: ThreatSpec | None = Field(default=None, description="the absolute changes of all pixels sum to at most eps")

    @model_validator(mode="after")
    def _check_threats(self) -> Threats:
        if not self.keys():
            raise ValueError("at least one threat is needed: linf, l2 or l1, for example `linf: {eps: 8/255}`")
        for norm, threat in self.items():
            if problem := oversized(norm, float(threat.eps), None):
                raise field_error(f"{norm}.eps", problem)
            check_steps(norm, threat.step_size, threat.sparsity, f"{norm}.")
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


class Eigenspace(SpecModel):
    """The leading principal directions of the training images: perturbations along them count as on the manifold."""

    rank: int = Field(
        ge=1, le=1_000_000, description="number of directions; at most what the images of the smallest class span"
    )
    shared: bool = Field(default=False, description="one eigenspace for all images, not one per class")


class EvaluateSpec(SpecModel):
    """How robustness is measured: projected gradient ascent under each threat, and their union."""

    threats: Threats | None = Field(
        default=None, description="threats of the test; default, and always on the validation split, those of training"
    )
    num_examples: int | None = Field(
        default=None, ge=1, description="examples to evaluate, the same share of each class; default all"
    )
    batch_size: int = Field(
        default=256, ge=1, le=65_536, description="examples attacked in one batch; does not affect the result"
    )
    validation: bool = Field(
        default=False,
        description="also measure the validation split under these attacks at the end, for model selection",
    )
    extra_metrics: ExtraMetrics = Field(
        default={},
        description="by name, functions in your code of (model, images, labels) on clean images; measured as "
        "`metric/NAME` at every evaluation",
    )
