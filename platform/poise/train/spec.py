"""The `train` section of a spec: length, optimizer, schedule, precision, intervals of checkpoints and evaluations."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.spec.base import SpecModel
from poise.spec.interval import Interval
from poise.spec.values import ExactNumber
from poise.train.plan import EpochPlan

__all__ = ["AdamW", "Checkpointing", "Interval", "Optimizer", "Schedule", "Sgd", "TrainSpec"]

Positive = Annotated[ExactNumber, Field(gt=0)]
NotNegative = Annotated[ExactNumber, Field(ge=0)]
Share = Annotated[ExactNumber, Field(ge=0, le=1)]


class Sgd(SpecModel):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: Annotated[ExactNumber, Field(gt=0, le=1000)] = Field(
        ExactNumber("0.1"), description="learning rate at schedule factor 1"
    )
    momentum: Annotated[ExactNumber, Field(ge=0, lt=1)] = Field(ExactNumber("0.9"), description="momentum")
    nesterov: bool = Field(False, description="Nesterov's momentum")
    weight_decay: NotNegative = Field(ExactNumber("5e-4"), description="L2 penalty")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AdamW(SpecModel):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: Annotated[ExactNumber, Field(gt=0, le=1000)] = Field(
        ExactNumber("1e-3"), description="learning rate at schedule factor 1"
    )
    beta1: Annotated[ExactNumber, Field(ge=0, lt=1)] = Field(
        ExactNumber("0.9"), description="decay of the first moment"
    )
    beta2: Annotated[ExactNumber, Field(ge=0, lt=1)] = Field(
        ExactNumber("0.999"), description="decay of the second moment"
    )
    eps: Positive = Field(ExactNumber("1e-8"), description="added to the denominator")
    weight_decay: NotNegative = Field(ExactNumber("0.01"), description="decoupled weight decay")


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="name")]


class _Warmup(SpecModel):
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up from 0")


class Constant(_Warmup):
    """Factor 1 throughout."""

    name: Literal["constant"] = "constant"


class Piecewise(_Warmup):
    """Multiplied by `factor` at each milestone."""

    name: Literal["piecewise"] = "piecewise"
    milestones: list[Annotated[ExactNumber, Field(gt=0, lt=1)]] = Field(
        [ExactNumber("1/2"), ExactNumber("3/4")], max_length=100, description="shares of the run, increasing"
    )
    factor: Positive = Field(ExactNumber("0.1"), description="factor on the learning rate at each milestone")

    @model_validator(mode="after")
    def _increasing(self) -> Piecewise:
        if any(a >= b for a, b in pairwise(self.milestones)):
            raise ValueError("milestones must increase")
        return self


class Linear(_Warmup):
    """Linear between points (share of the run, factor)."""

    name: Literal["linear"] = "linear"
    points: list[Annotated[list[NotNegative], Field(min_length=2, max_length=2)]] = Field(
        [[ExactNumber(0), ExactNumber(1)], [ExactNumber(1), ExactNumber(0)]],
        min_length=2,
        max_length=100,
        description="[share of the run, factor]",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Linear:
        shares = [float(point[0]) for point in self.points]
        if (shares[0], shares[-1]) != (0, 1) or any(a >= b for a, b in pairwise(shares)):
            raise ValueError("points go from share 0 to share 1 and increase")
        return self


class Cosine(_Warmup):
    """Half a cosine from 1 to `final`."""

    name: Literal["cosine"] = "cosine"
    final: Share = Field(ExactNumber(0), description="factor at the end")


class OneCycle(_Warmup):
    """From `start` up to 1 at share `peak`, then down to `final`, each along half a cosine."""

    name: Literal["one_cycle"] = "one_cycle"
    peak: Annotated[ExactNumber, Field(gt=0, lt=1)] = Field(
        ExactNumber("0.3"), description="share of the run at which the factor is 1"
    )
    start: Share = Field(ExactNumber("0.04"), description="factor at the start")
    final: Share = Field(ExactNumber("1e-4"), description="factor at the end")


Schedule = Annotated[Constant | Piecewise | Linear | Cosine | OneCycle, Field(discriminator="name")]


class Checkpointing(SpecModel):
    """When the exact state is committed to the store. The best and the last checkpoint are always kept."""

    every: Interval = Field(
        Interval(epochs=1), description="interval between commits; each new best and the last step are committed too"
    )
    keep: int = Field(2, ge=1, le=10_000, description="number of newest checkpoints to keep besides the best")


class TrainSpec(SpecModel):
    """The training loop."""

    epochs: int | None = Field(None, ge=1, le=10**6, description="passes over the training set; or give steps")
    steps: int | None = Field(None, ge=1, le=10**9, description="optimizer steps; or give epochs")
    optimizer: Optimizer = Field(Sgd(), description="optimizer of all trainable parameters")
    schedule: Schedule = Field(Constant(), description="factor on the learning rate over the run")
    clip_norm: Positive | None = Field(None, description="largest l2 norm of the whole gradient")
    accumulate: int = Field(
        1,
        ge=1,
        le=4096,
        description="batches whose mean gradient makes one optimizer step; the last step of an epoch takes the rest",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: forward passes under autocast, fp32 weights")
    checkpoint: Checkpointing = Field(Checkpointing(), description="when the state is committed")
    evaluate_every: Interval = Field(
        Interval(epochs=1), description="interval between evaluations on the validation split"
    )
    log_every: int = Field(10, ge=1, le=10_000, description="optimizer steps averaged into one row of metrics")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    def plan(self, batches: int, repeats: int = 1) -> EpochPlan:
        """The plan of an epoch of so many batches: which of them each step uses."""
        return EpochPlan(batches, self.accumulate, repeats)

    def total_steps(self, steps_per_epoch: int) -> int:
        """The number of optimizer steps of the whole run."""
        return self.steps or (self.epochs or 0) * steps_per_epoch
