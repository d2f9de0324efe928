"""`kind: robust.evaluate`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.data.spec import DataSpec
from poise.models.spec import ModelSpec
from poise.robust.spec import Coordinates, Norm, ThreatSpec
from poise.spec import Name, Real, RunName, RunSpec, Section, mistake

__all__ = ["BallSpec", "FgsmStage", "PgdStage", "ReverifySpec", "RobustEvaluateSpec", "Stage", "SubjectSpec"]

Eps = Annotated[Real, Field(ge=0, le=1_000_000)]
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
        None, description="module:function of your own: called without arguments, returns an nn.Module on [0, 1]"
    )

    @model_validator(mode="after")
    def _one_source(self) -> SubjectSpec:
        if len([key for key in ("run", "file", "function") if getattr(self, key) is not None]) != 1:
            raise ValueError("a model to evaluate is one of run: RUN, file: FILE or function: MODULE:FUNCTION")
        if self.checkpoint is not None and self.run is None:
            raise mistake("checkpoint", "only a run has checkpoints to choose from: remove it")
        for key, field in ModelSpec.model_fields.items():
            if self.file is None and getattr(self, key) != field.default:
                raise mistake(key, f"the architecture is written for a file only; that of a {self.source} is known")
        if self.function is not None and not _FUNCTION.fullmatch(self.function):
            raise mistake("function", f"{self.function[:60]!r} is not of the form package.module:function")
        return self

    @property
    def source(self) -> Literal["run", "file", "function"]:
        """Where the weights come from."""
        return "run" if self.run is not None else "file" if self.file is not None else "function"


class BallSpec(Section):
    """What the adversary may change."""

    norm: Norm = Field(description="norm of the change")
    eps: Eps = Field(description="radius of the ball, pixels in [0, 1]; a fraction such as 8/255 is exact")

    def __str__(self) -> str:
        return f"{self.norm}, eps {self.eps}"


class _Stage(Section):
    name: Name | None = Field(None, description="name of the stage; default attack and norm, such as pgd-linf")
    threat: BallSpec = Field(description="what the adversary may change")

    @property
    def key(self) -> str:
        """The name of the stage, in paths and columns."""
        return self.name or f"{getattr(self, 'attack')}-{self.threat.norm}"  # noqa: B009

    @property
    def balls(self) -> tuple[BallSpec, ...]:
        """The balls in whose union the attack stays."""
        return (self.threat,)


class FgsmStage(_Stage):
    """One step of the sign of the gradient, or the steepest of another norm."""

    attack: Literal["fgsm"] = Field(description="one gradient step to the surface of the ball")

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        return 1, 3


class PgdStage(_Stage):
    """Projected gradient ascent."""

    attack: Literal["pgd"] = Field(description="projected gradient ascent")
    loss: Literal["ce", "margin", "dlr"] = Field("ce", description="loss that is climbed")
    steps: int = Field(40, ge=1, le=100_000, description="gradient steps of one run")
    step_size: Annotated[Real, Field(gt=0, le=1_000_000)] | None = Field(
        None, description="length of a step in the norm of the threat; default 2.5 * eps / steps, at most eps"
    )
    restarts: int = Field(1, ge=1, le=1000, description="runs, each on what still stands; the later start at random")
    random_start: bool = Field(True, description="start the first run at random in the ball, not at the image")
    sparsity: Coordinates | None = Field(
        None, description="l1 only: coordinates that a step moves, a count or a range [low, high]; default [5, 20]"
    )

    @model_validator(mode="after")
    def _sparsity_of_l1(self) -> PgdStage:
        if self.sparsity is not None and self.threat.norm != "l1":
            raise mistake("sparsity", f"sparsity belongs to l1 alone: remove it from {self.threat.norm}")
        return self

    def search(self) -> ThreatSpec:
        """The same search as training has it."""
        keys = ("steps", "step_size", "restarts", "random_start", "sparsity")
        return ThreatSpec(eps=self.threat.eps, **{key: getattr(self, key) for key in keys})

    def spent(self) -> tuple[int, int]:
        """Gradients and queries per example, at most."""
        return self.steps * self.restarts, (self.steps + 1) * self.restarts + 1


Stage = FgsmStage | PgdStage


class ReverifySpec(Section):
    """Adversarial examples that were kept, judged again."""

    run: RunName = Field(description="finished run of robust.evaluate with keep_adversarial, in the same store")


class RobustEvaluateSpec(RunSpec):
    """Any classifier under a list of attacks, cheap to costly; or its kept adversarial examples judged again."""

    kind: Literal["robust.evaluate"]
    model: SubjectSpec | None = Field(None, description="classifier under test")
    data: DataSpec | None = Field(
        None,
        description="data set; default, for a run, its own. Only its images are used: nothing is cropped or mirrored",
    )
    split: Literal["train", "validation", "test"] = Field("test", description="which images are attacked")
    examples: int | None = Field(None, ge=1, description="images of the split, from the first; default all")
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
        keys = ["clean", *(stage.key for stage in self.attacks)]
        for index, key in enumerate(keys[1:], 1):
            if key in keys[:index]:
                raise mistake(f"attacks.{index - 1}", f"the name {key} is taken: give this stage another `name`")
        return self

    def cost(self) -> list[str]:
        """What each stage takes of an example that stands to its end."""
        if self.reverify is not None:
            return [f"one query for each adversarial example that {self.reverify.run} has kept"]
        spent = [(stage.key, *stage.spent()) for stage in self.attacks]
        lines = [
            f"{key}: at most {gradients:,} gradients and {queries:,} queries per example"
            for key, gradients, queries in spent
        ]
        return [*lines, f"{self.workers.count} workers of {self.workers.cpus} CPU and {self.workers.gpus} GPU"]
