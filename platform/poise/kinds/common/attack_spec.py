"""The attacks of an evaluation, as a spec lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from poise.robust.spec import DEFAULT_TARGETS, Coordinates, Eps, Norm, StepSize, check_steps, oversized
from poise.robust.step_sizes import DECAYING_STEPS
from poise.spec import ExactNumber, Name, SpecModel, field_error

__all__ = [
    "AUTOATTACK",
    "ApgdStage",
    "AutoAttackStage",
    "BallSpec",
    "FabStage",
    "FgsmStage",
    "MsdStage",
    "PgdStage",
    "SquareStage",
    "Stage",
    "threat_names",
]

Draws = Annotated[
    int | None,
    Field(
        ge=2,
        le=10_000,
        description="for a randomised model: attack and classify by its mean prediction over so many draws",
    ),
]
Restarts = Annotated[
    int, Field(ge=1, le=1000, description="runs, each on the examples still correct; later ones start at random")
]
_HEAD = ("name", "attack", "threat", "threats")
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
RAND = ("apgd-ce", "apgd-dlr")


class BallSpec(SpecModel):
    """What the adversary may change."""

    norm: Norm = Field(description="norm of the change")
    eps: Eps = Field(description="radius of the ball, pixels in [0, 1]; a fraction such as 8/255 is exact")

    @model_validator(mode="before")
    @classmethod
    def _norm_and_eps(cls, value: Any) -> Any:
        """Refuse a ball written as the threats of a training, `{linf: 8/255}`, or as a norm alone."""
        norm: Any = value
        eps: Any = None
        if isinstance(value, dict):
            norm, eps = next(iter(value.items()), ("", None))
        if norm in get_args(Norm):
            radius = _radius_or_example(eps.get("eps") if isinstance(eps, dict) else eps)
            raise ValueError(f"norm and eps are keys of their own: write `{{norm: {norm}, eps: {radius}}}`")
        return value

    @model_validator(mode="after")
    def _within_the_box(self) -> BallSpec:
        problem = oversized(self.norm, float(self.eps), None)
        if problem:
            raise field_error("eps", problem)
        return self

    def __str__(self) -> str:
        return f"{self.norm} eps {self.eps}"


class _Stage(SpecModel):
    name: Name | None = Field(None, description="name of the stage; default attack and norm, such as pgd-linf")

    @property
    def prefix(self) -> str:
        """The beginning of its default name."""
        return str(getattr(self, "attack"))  # noqa: B009 - every stage has one, of a type of its own

    @property
    def balls(self) -> tuple[BallSpec, ...]:
        """The balls that the attack may use."""
        raise NotImplementedError

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the attacks that it runs, in paths and columns."""
        return (self.name or "-".join([self.prefix, *(ball.norm for ball in self.balls)]),)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of its attack that the spec sets."""
        options: dict[str, Any] = {}
        for key, value in self:
            if key not in (*_HEAD, "draws") and value is not None:
                options[key] = float(value) if isinstance(value, ExactNumber) else value
        return options

    def words(self) -> str:
        """The attack as text for tables and pages, with eps as it was written."""
        balls = " and ".join(map(str, self.balls)) if len(self.balls) > 1 else f"eps {self.balls[0].eps}"
        options = []
        for key, value in self:
            if key not in _HEAD and value not in (None, False):
                name = key.replace("_", " ")
                options.append(name if value is True else f"{name} {value}")
        return ", ".join([str(getattr(self, "attack")).upper(), balls, *options])  # noqa: B009


class _OneBall(_Stage):
    threat: BallSpec = Field(description="what the adversary may change")

    @property
    def balls(self) -> tuple[BallSpec, ...]:
        """Its one threat."""
        return (self.threat,)


class _SeveralBalls(_Stage):
    threats: dict[Norm, Eps] = Field(min_length=1, description="radius of each ball, by norm, such as {linf: 8/255}")

    @model_validator(mode="before")
    @classmethod
    def _a_radius_for_each_norm(cls, values: Any) -> Any:
        """Refuse other ways of writing the threats; the message shows the same threats in the right form."""
        if not isinstance(values, dict):
            return values
        threats = values.get("threats")
        if _are_radii(threats):
            return values
        radii = _guess_radii(values.get("threat") if threats is None else threats) or {"linf": "8/255"}
        example = ", ".join(f"{norm}: {eps}" for norm, eps in radii.items())
        raise field_error("threats", f"needs a radius for each norm: write `threats: {{{example}}}`")

    @model_validator(mode="after")
    def _within_the_box(self) -> _SeveralBalls:
        for norm, eps in self.threats.items():
            problem = oversized(norm, float(eps), None)
            if problem:
                raise field_error(f"threats.{norm}", problem)
        return self

    @property
    def balls(self) -> tuple[BallSpec, ...]:
        """In the order in which they were written."""
        return tuple(BallSpec(norm=norm, eps=eps) for norm, eps in self.threats.items())


def _are_radii(value: Any) -> bool:
    """Whether this is a mapping of keys to plain values, which are validated one by one."""
    if not isinstance(value, dict) or not value or {"norm", "eps"} & value.keys():
        return False
    return all(isinstance(eps, (int, float, str)) for eps in value.values())


def _guess_radii(value: Any) -> dict[str, Any]:
    """The radius of each norm, as far as it can be read from threats that are written in another form.

    Examples: `linf`, `8/255`, `[linf, l2]`, `{norm: linf, eps: 8/255}`, `{linf: {eps: 8/255}}`. {} without a norm.
    """
    if isinstance(value, (int, float, str)):
        return {str(value): "8/255"} if value in get_args(Norm) else {"linf": value}
    if isinstance(value, list):
        radii: dict[str, Any] = {}
        for item in value:
            radii |= _guess_radii(item)
        return radii
    if not isinstance(value, dict):
        return {}
    if {"norm", "eps"} & value.keys():
        value = {value.get("norm", "linf"): value.get("eps")}
    radii = {}
    for norm, eps in value.items():
        if norm in get_args(Norm):
            radii[norm] = _radius_or_example(eps.get("eps") if isinstance(eps, dict) else eps)
    return radii


def _radius_or_example(eps: Any) -> int | float | str:
    """The radius as it was written; where there is none, an example."""
    return eps if isinstance(eps, (int, float, str)) else "8/255"


class FgsmStage(_OneBall):
    """One step along the gradient."""

    attack: Literal["fgsm"] = Field(description="one gradient step to the surface of the ball")

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        return 1, 3


class PgdStage(_OneBall):
    """Projected gradient ascent."""

    attack: Literal["pgd"] = Field(description="projected gradient ascent")
    loss: Literal["ce", "cw", "dlr"] = Field("ce", description="loss that is maximised")
    steps: int = Field(40, ge=1, le=1000, description="gradient steps of one run")
    step_size: StepSize | None = Field(
        None, description=f"length of a step in the norm of the threat; default: {DECAYING_STEPS}"
    )
    restarts: Restarts = 1
    random_start: bool = Field(True, description="start the first run at random in the ball, not at the image")
    sparsity: Coordinates = None
    draws: Draws = None

    @model_validator(mode="after")
    def _check_steps(self) -> PgdStage:
        check_steps(self.threat.norm, self.step_size, self.sparsity)
        return self

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        draws = self.draws or 1
        return self.steps * self.restarts * draws, ((self.steps + 1) * self.restarts + 1) * draws


class ApgdStage(_OneBall):
    """Auto-PGD."""

    attack: Literal["apgd"] = Field(description="Auto-PGD, which adapts its step size")
    loss: Literal["ce", "cw", "dlr", "targeted"] = Field(
        "ce", description="loss that is maximised; targeted: the targeted DLR, one run for each target"
    )
    steps: int = Field(100, ge=1, le=100_000, description="gradient steps of one run")
    restarts: Restarts = 1
    targets: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description=f"targeted only: how many of the likeliest wrong classes are tried; default {DEFAULT_TARGETS}",
    )
    draws: Draws = None

    @model_validator(mode="after")
    def _targets_of_targeted(self) -> ApgdStage:
        if self.targets is not None and self.loss != "targeted":
            raise field_error("targets", f"the loss {self.loss} has no targets: remove them, or set loss to targeted")
        return self

    @property
    def prefix(self) -> str:
        """The attack with its loss: stages with several losses are common."""
        return f"apgd-{self.loss}"

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most. Each radius of a run takes one gradient more than its steps."""
        targets = self.targets or DEFAULT_TARGETS
        runs = self.restarts * (targets if self.loss == "targeted" else 1)
        gradients = runs * (self.steps + (3 if self.threat.norm == "l1" else 1))
        draws = self.draws or 1
        return gradients * draws, (gradients + 1) * draws


class FabStage(_OneBall):
    """Targeted Fast Adaptive Boundary attack."""

    attack: Literal["fab"] = Field(description="search of the nearest misclassified point along linearised boundaries")
    steps: int = Field(100, ge=1, le=100_000, description="gradient steps of one run")
    restarts: Restarts = 1
    targets: int = Field(
        DEFAULT_TARGETS, ge=1, le=100_000, description="how many of the likeliest wrong classes are tried"
    )

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        runs = self.restarts * self.targets
        return runs * self.steps, runs * (2 * self.steps + 5) + 1


class SquareStage(_OneBall):
    """Square attack: random search without gradients."""

    attack: Literal["square"] = Field(description="random search over windows of the image, without gradients")
    queries: int = Field(5000, ge=1, le=10_000_000, description="points that one run tries")
    restarts: Restarts = 1
    p_init: Annotated[ExactNumber, Field(gt=0, le=1)] = Field(
        ExactNumber("0.8"), description="share of the image that the first windows cover"
    )

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        return 0, self.queries * self.restarts + 1


class MsdStage(_SeveralBalls):
    """Multi steepest descent, in the union of several balls."""

    attack: Literal["msd"] = Field(description="steepest ascent that takes the best norm at each step")
    steps: int = Field(50, ge=1, le=100_000, description="gradient steps of one run")
    restarts: Restarts = 1

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        gradients = self.steps * self.restarts
        return gradients, gradients * (len(self.threats) + 1) + self.restarts + 1


class AutoAttackStage(_SeveralBalls):
    """The four attacks of AutoAttack, under one threat after the other."""

    attack: Literal["autoattack"] = Field(description="APGD-CE, APGD-T, FAB-T and Square for each threat in turn")
    version: Literal["standard", "rand"] = Field(
        "standard", description="rand is for randomised models: APGD-CE and APGD-DLR on their mean prediction"
    )
    draws: Draws = None

    @model_validator(mode="before")
    @classmethod
    def _draws_of_rand(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("version") == "rand" and values.get("draws") is None:
            return {**values, "draws": 20}
        return values

    @model_validator(mode="after")
    def _only_rand_draws(self) -> AutoAttackStage:
        if self.draws is not None and self.version != "rand":
            raise field_error("draws", "the standard version makes one draw: remove draws, or set version to rand")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """One for each attack and ball: name of the stage, attack, norm, such as aa-fab-t-linf."""
        attacks = RAND if self.version == "rand" else AUTOATTACK
        prefix = self.name or "aa"
        return tuple(f"{prefix}-{attack}-{ball.norm}" for ball in self.balls for attack in attacks)

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most; a model of few classes has fewer targets."""
        if self.draws is not None:
            runs = [10 * 103 if norm == "l1" else 2 * 101 for norm in self.threats]
            return self.draws * sum(runs), self.draws * (sum(runs) + 2 * len(runs))
        gradients = [1924 if norm == "l1" else 1910 for norm in self.threats]
        return sum(gradients), sum(gradients) + 5950 * len(gradients)


Stage = FgsmStage | PgdStage | ApgdStage | FabStage | SquareStage | MsdStage | AutoAttackStage


def threat_names(stages: Sequence[Stage]) -> dict[BallSpec, str]:
    """The column of each ball: its norm; with its radius where several balls have the same norm."""
    balls = list(dict.fromkeys(ball for stage in stages for ball in stage.balls))
    norms = [ball.norm for ball in balls]
    names: dict[BallSpec, str] = {}
    for ball in balls:
        is_only_one = norms.count(ball.norm) == 1
        names[ball] = ball.norm if is_only_one else f"{ball.norm} {ball.eps}"
    return names
