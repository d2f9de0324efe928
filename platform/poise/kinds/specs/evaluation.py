"""`kind: robust.evaluate`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from poise.data.spec import DataSpec, known_sizes
from poise.models.spec import ModelSpec
from poise.robust.spec import Coordinates, Norm, oversized
from poise.spec import Input, MetricSource, Name, Real, RunName, RunSpec, Section, mistake, summary_sources

__all__ = [
    "AUTOATTACK",
    "ApgdStage",
    "AutoAttackStage",
    "BallSpec",
    "FabStage",
    "FgsmStage",
    "MsdStage",
    "PgdStage",
    "ReverifySpec",
    "RobustEvaluateSpec",
    "SquareStage",
    "Stage",
    "SubjectSpec",
    "threat_names",
]

Eps = Annotated[Real, Field(ge=0, le=1_000_000)]
Draws = Annotated[
    int | None,
    Field(
        ge=2, le=10_000, description="for a randomised model: attack and judge its mean prediction over so many draws"
    ),
]
Restarts = Annotated[
    int, Field(ge=1, le=1000, description="runs, each on what still stands; later ones start at random")
]
_HEAD = ("name", "attack", "threat", "threats")
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
RAND = ("apgd-ce", "apgd-dlr")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class SubjectSpec(ModelSpec):
    """The classifier under test; one of `run`, `file` and `function`. What `ModelSpec` says is of a `file`."""

    run: RunName | None = Field(None, description="finished run of robust.train in the same store")
    checkpoint: Literal["best", "final", "averaged"] | None = Field(
        None, description="weights of the run; default those that it has selected"
    )
    file: str | None = Field(
        None, min_length=1, max_length=1000, description="state dict in safetensors, here or on s3://"
    )
    function: str | None = Field(
        None, description="module:function of your own that returns an nn.Module on [0, 1]; `file` may add its weights"
    )
    arguments: dict[str, Any] = Field({}, description="keyword arguments that the function is called with")

    @model_validator(mode="after")
    def _one_source(self) -> SubjectSpec:
        named = [key for key in ("run", "file", "function") if getattr(self, key) is not None]
        if len(named) != 1 and named != ["file", "function"]:
            raise ValueError(
                "a model to evaluate is one of run: RUN, file: FILE or function: MODULE:FUNCTION; a function may have "
                "a file with its weights"
            )
        if self.arguments and self.function is None:
            raise mistake("arguments", "only a function takes arguments: remove them")
        if self.checkpoint is not None and self.run is None:
            raise mistake("checkpoint", "only a run has checkpoints to choose from: remove it")
        for key, field in ModelSpec.model_fields.items():
            if self.source != "file" and getattr(self, key) != field.default:
                raise mistake(key, f"the architecture is written for a file only; that of a {self.source} is known")
        if self.function is not None and not _FUNCTION.fullmatch(self.function):
            raise mistake("function", f"{self.function[:60]!r} is not of the form package.module:function")
        return self

    @property
    def source(self) -> Literal["run", "file", "function"]:
        """Where the weights come from."""
        return "run" if self.run is not None else "function" if self.function is not None else "file"

    def inputs(self) -> Iterator[Input]:
        """The run, the file or the code."""
        if self.run is not None:
            yield Input(("run",), "run", self.run, kinds=("robust.train",))
        if self.file is not None:
            yield Input(("file",), "files", self.file)
        if self.function is not None:
            yield Input(("function",), "code", self.function)


class BallSpec(Section):
    """What the adversary may change."""

    norm: Norm = Field(description="norm of the change")
    eps: Eps = Field(description="radius of the ball, pixels in [0, 1]; a fraction such as 8/255 is exact")

    @model_validator(mode="before")
    @classmethod
    def _norm_and_eps(cls, given: Any) -> Any:
        """A ball as the threats of a training are written, `{linf: 8/255}`, or a norm alone."""
        norm, eps = next(iter(given.items()), ("", None)) if isinstance(given, dict) else (given, None)
        if norm in get_args(Norm):
            eps = eps.get("eps") if isinstance(eps, dict) else eps
            shown = eps if isinstance(eps, (int, float, str)) else "8/255"
            raise ValueError(f"norm and eps are keys of their own: write `{{norm: {norm}, eps: {shown}}}`")
        return given

    @model_validator(mode="after")
    def _within_the_box(self) -> BallSpec:
        if problem := oversized(self.norm, float(self.eps), None):
            raise mistake("eps", problem)
        return self

    def __str__(self) -> str:
        return f"{self.norm} eps {self.eps}"


class _Stage(Section):
    name: Name | None = Field(None, description="name of the stage; default attack and norm, such as pgd-linf")

    @property
    def prefix(self) -> str:
        """What its name begins with by default."""
        return str(getattr(self, "attack"))  # noqa: B009 - every stage has one, of a type of its own

    @property
    def balls(self) -> tuple[BallSpec, ...]:
        """The balls that the attack may use."""
        raise NotImplementedError

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of what it runs, in paths and columns."""
        return (self.name or "-".join([self.prefix, *(ball.norm for ball in self.balls)]),)

    def options(self) -> dict[str, Any]:
        """The keyword arguments that it decides, of the attack that it names."""
        written = {key: value for key, value in self if key not in (*_HEAD, "draws") and value is not None}
        return {key: float(value) if isinstance(value, Real) else value for key, value in written.items()}

    def words(self) -> str:
        """Itself for tables and pages, eps as it was written."""
        balls = " and ".join(map(str, self.balls)) if len(self.balls) > 1 else f"eps {self.balls[0].eps}"
        said = {key.replace("_", " "): value for key, value in self if key not in _HEAD and value not in (None, False)}
        options = [key if value is True else f"{key} {value}" for key, value in said.items()]
        return ", ".join([str(getattr(self, "attack")).upper(), balls, *options])  # noqa: B009


class _OneBall(_Stage):
    threat: BallSpec = Field(description="what the adversary may change")

    @property
    def balls(self) -> tuple[BallSpec, ...]:
        """Its threat alone."""
        return (self.threat,)


class _SeveralBalls(_Stage):
    threats: dict[Norm, Eps] = Field(min_length=1, description="radius of each ball, by norm, such as {linf: 8/255}")

    @model_validator(mode="before")
    @classmethod
    def _a_radius_for_each_norm(cls, values: Any) -> Any:
        """Other forms are refused with the same threats as they are to be written, as far as they can be told."""
        if not isinstance(values, dict) or _are_radii(given := values.get("threats")):
            return values
        meant = _radii_meant(values.get("threat") if given is None else given)
        shown = ", ".join(f"{norm}: {eps}" for norm, eps in (meant or {"linf": "8/255"}).items())
        raise mistake("threats", f"needs a radius for each norm: write `threats: {{{shown}}}`")

    @model_validator(mode="after")
    def _within_the_box(self) -> _SeveralBalls:
        for norm, eps in self.threats.items():
            if problem := oversized(norm, float(eps), None):
                raise mistake(f"threats.{norm}", problem)
        return self

    @property
    def balls(self) -> tuple[BallSpec, ...]:
        """In the order in which they were written."""
        return tuple(BallSpec(norm=norm, eps=eps) for norm, eps in self.threats.items())


def _are_radii(given: Any) -> bool:
    """Whether this is a mapping of keys to plain values, which are validated one by one."""
    if not isinstance(given, dict) or not given or {"norm", "eps"} & given.keys():
        return False
    return all(isinstance(eps, (int, float, str)) for eps in given.values())


def _radii_meant(given: Any) -> dict[str, Any]:
    """The radius of each norm that somebody may have meant who has written it otherwise; {} where no norm is named."""
    if isinstance(given, (int, float, str)):
        return {str(given): "8/255"} if given in get_args(Norm) else {"linf": given}
    if isinstance(given, list):
        return {norm: eps for each in given for norm, eps in _radii_meant(each).items()}
    if not isinstance(given, dict):
        return {}
    if {"norm", "eps"} & given.keys():
        given = {given.get("norm", "linf"): given.get("eps")}
    plain = {norm: eps.get("eps") if isinstance(eps, dict) else eps for norm, eps in given.items()}
    known = {norm: eps for norm, eps in plain.items() if norm in get_args(Norm)}
    return {norm: eps if isinstance(eps, (int, float, str)) else "8/255" for norm, eps in known.items()}


class FgsmStage(_OneBall):
    """One step along the gradient."""

    attack: Literal["fgsm"] = Field(description="one gradient step to the surface of the ball")

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        return 1, 3


class PgdStage(_OneBall):
    """Projected gradient ascent."""

    attack: Literal["pgd"] = Field(description="projected gradient ascent")
    loss: Literal["ce", "margin", "dlr"] = Field("ce", description="loss that is climbed")
    steps: int = Field(40, ge=1, le=1000, description="gradient steps of one run")
    step_size: Annotated[Real, Field(gt=0, le=1_000_000)] | None = Field(
        None,
        description="length of a step in the norm of the threat; default: steps that decay from eps to 0 on a cosine",
    )
    restarts: Restarts = 1
    random_start: bool = Field(True, description="start the first run at random in the ball, not at the image")
    sparsity: Coordinates | None = Field(
        None, description="l1 only: coordinates that a step moves, a count or a range [low, high]; default [5, 20]"
    )
    draws: Draws = None

    @model_validator(mode="after")
    def _sparsity_of_l1(self) -> PgdStage:
        if self.sparsity is not None and self.threat.norm != "l1":
            raise mistake("sparsity", f"sparsity belongs to l1 alone: remove it from {self.threat.norm}")
        size = 0.0 if self.step_size is None else float(self.step_size)
        if problem := oversized(self.threat.norm, size, None, "step_size"):
            raise mistake("step_size", problem)
        return self

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        draws = self.draws or 1
        return self.steps * self.restarts * draws, ((self.steps + 1) * self.restarts + 1) * draws


class ApgdStage(_OneBall):
    """Auto-PGD."""

    attack: Literal["apgd"] = Field(description="Auto-PGD, which chooses its steps itself")
    loss: Literal["ce", "margin", "dlr", "targeted"] = Field(
        "ce", description="loss that is climbed; targeted: the targeted DLR, one run for each target"
    )
    steps: int = Field(100, ge=1, le=100_000, description="gradient steps of one run")
    restarts: Restarts = 1
    targets: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="targeted only: how many of the likeliest wrong classes are tried; default 9",
    )
    draws: Draws = None

    @model_validator(mode="after")
    def _targets_of_targeted(self) -> ApgdStage:
        if self.targets is not None and self.loss != "targeted":
            raise mistake("targets", f"the loss {self.loss} has no targets: remove them, or set loss to targeted")
        return self

    @property
    def prefix(self) -> str:
        """With the loss, of which several are often tried one after the other."""
        return f"apgd-{self.loss}"

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most: each ball of a run takes one more than its steps."""
        runs = self.restarts * ((self.targets or 9) if self.loss == "targeted" else 1)
        gradients = runs * (self.steps + (3 if self.threat.norm == "l1" else 1))
        draws = self.draws or 1
        return gradients * draws, (gradients + 1) * draws


class FabStage(_OneBall):
    """Targeted Fast Adaptive Boundary attack."""

    attack: Literal["fab"] = Field(description="the nearest wrong point that linearised boundaries lead to")
    steps: int = Field(100, ge=1, le=100_000, description="gradient steps of one run")
    restarts: Restarts = 1
    targets: int = Field(9, ge=1, le=100_000, description="how many of the likeliest wrong classes are tried")

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        runs = self.restarts * self.targets
        return runs * self.steps, runs * (2 * self.steps + 5) + 1


class SquareStage(_OneBall):
    """Random search that sees no gradient."""

    attack: Literal["square"] = Field(description="random search over windows of the image, without a gradient")
    queries: int = Field(5000, ge=1, le=10_000_000, description="points that one run tries")
    restarts: Restarts = 1
    p_init: Annotated[Real, Field(gt=0, le=1)] = Field(
        Real("0.8"), description="share of the image that the first windows cover"
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
            raise mistake("draws", "the standard version makes one draw: remove draws, or set version to rand")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of its attacks, with its own name before and the norm behind, such as aa-fab-t-linf."""
        attacks = RAND if self.version == "rand" else AUTOATTACK
        return tuple(f"{self.name or 'aa'}-{attack}-{ball.norm}" for ball in self.balls for attack in attacks)

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most; a model of few classes has fewer targets."""
        if self.draws is not None:
            runs = [10 * 103 if norm == "l1" else 2 * 101 for norm in self.threats]
            return self.draws * sum(runs), self.draws * (sum(runs) + 2 * len(runs))
        gradients = [1924 if norm == "l1" else 1910 for norm in self.threats]
        return sum(gradients), sum(gradients) + 5950 * len(gradients)


Stage = FgsmStage | PgdStage | ApgdStage | FabStage | SquareStage | MsdStage | AutoAttackStage


def threat_names(stages: Sequence[Stage]) -> dict[BallSpec, str]:
    """A column for each ball: its norm, with its radius where several balls share that."""
    balls = list(dict.fromkeys(ball for stage in stages for ball in stage.balls))
    norms = [ball.norm for ball in balls]
    return {ball: ball.norm if norms.count(ball.norm) == 1 else f"{ball.norm} {ball.eps}" for ball in balls}


class ReverifySpec(Section):
    """Adversarial examples that were kept, judged again."""

    run: RunName = Field(description="finished run of robust.evaluate with keep_adversarial, in the same store")

    def inputs(self) -> Iterator[Input]:
        """The evaluation."""
        yield Input(("run",), "run", self.run, kinds=("robust.evaluate",))


class RobustEvaluateSpec(RunSpec):
    """Any classifier under a list of attacks, cheap to costly; or its kept adversarial examples judged again."""

    kind: Literal["robust.evaluate"]
    model: SubjectSpec | None = Field(None, description="classifier under test")
    data: DataSpec | None = Field(
        None,
        description="data set; default, for a run, its own. Only its images are used: nothing is cropped or mirrored",
    )
    split: Literal["train", "validation", "test"] = Field("test", description="which images are attacked")
    examples: int | None = Field(
        None, ge=1, description="images of the split, the same share of each class whatever their order; default all"
    )
    batch_size: int = Field(
        256, ge=1, le=65_536, description="examples attacked, and committed, at once; the result does not hang on it"
    )
    attacks: list[Annotated[Stage, Field(discriminator="attack")]] = Field(
        [], max_length=100, description="the stages in order; each attacks what still stands under its threat"
    )
    keep_adversarial: bool = Field(False, description="keep the points that fooled the model, exactly, in float32")
    reverify: ReverifySpec | None = Field(None, description="judge kept adversarial examples again instead")

    @model_validator(mode="after")
    def _one_task(self) -> RobustEvaluateSpec:
        if self.reverify is not None:
            for key in ("model", "data", "split", "examples", "attacks", "keep_adversarial"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise mistake(key, f"{self.reverify.run} has chosen that: remove it")
            return self
        if self.model is None:
            raise mistake("model", "is required: run: RUN, file: FILE or function: MODULE:FUNCTION")
        if self.data is None and self.model.run is None:
            raise mistake("data", f"is required: a {self.model.source} does not say what it was trained on")
        if not self.attacks:
            raise mistake("attacks", "at least one is needed, such as {attack: pgd, threat: {norm: linf, eps: 8/255}}")
        sizes = None if self.data is None else known_sizes(self.data)
        for index, stage in enumerate(self.attacks):
            for ball in stage.balls:
                if problem := oversized(ball.norm, float(ball.eps), sizes and math.prod(sizes.shape)):
                    raise mistake(f"attacks.{index}", problem)
        taken = {"clean"}
        for index, stage in enumerate(self.attacks):
            if again := taken.intersection(stage.keys):
                raise mistake(f"attacks.{index}", f"the name {min(again)} is taken: give this stage another `name`")
            taken.update(stage.keys)
        return self

    def metrics(self) -> dict[str, MetricSource]:
        """Accuracies on the images that are attacked; their rows are called `test`, whatever the split."""
        if self.reverify is not None:
            return {}
        source = MetricSource(self.split, "test", attacks="evaluation")
        names = ["clean", *(f"robust/{column}" for column in self._columns()), "robust/union"]
        return dict.fromkeys(names, source) | summary_sources(["accuracy.*"], names, self.split, "evaluation")

    def _columns(self) -> list[str]:
        """What accuracies are told of: each ball, and each union of balls that one attack searches."""
        names = threat_names(self.attacks)
        columns: list[str] = []
        for stage in self.attacks:
            balls = [names[ball] for ball in stage.balls]
            columns += ["+".join(balls)] if isinstance(stage, MsdStage) else balls
        return list(dict.fromkeys(columns))

    def cost(self) -> list[str]:
        """What each stage takes of an example that stands to its end."""
        if self.reverify is not None:
            return [f"one query for each adversarial example that {self.reverify.run} has kept"]
        spent = [(", ".join(stage.keys), *stage.spent()) for stage in self.attacks]
        lines = [f"{keys}: at most {g:,} gradients and {q:,} queries per example" for keys, g, q in spent]
        return [*lines, f"{self.workers.count} workers of {self.workers.cpus} CPU and {self.workers.gpus} GPU"]
