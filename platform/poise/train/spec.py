"""The `train` section: how long, by which optimizer and schedule, in which precision, saved how often."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.spec.base import Section
from poise.spec.interval import Every
from poise.spec.values import Real
from poise.train.plan import EpochPlan

__all__ = ["AdamW", "Checkpointing", "Every", "Optimizer", "Schedule", "Sgd", "TrainSpec"]

Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, le=1)]


class Sgd(Section):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: Annotated[Real, Field(gt=0, le=1000)] = Field(Real("0.1"), description="learning rate at schedule factor 1")
    momentum: Annotated[Real, Field(ge=0, lt=1)] = Field(Real("0.9"), description="momentum")
    nesterov: bool = Field(False, description="Nesterov's momentum")
    weight_decay: NotNegative = Field(Real("5e-4"), description="L2 penalty")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AdamW(Section):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: Annotated[Real, Field(gt=0, le=1000)] = Field(Real("1e-3"), description="learning rate at schedule factor 1")
    beta1: Annotated[Real, Field(ge=0, lt=1)] = Field(Real("0.9"), description="decay of the first moment")
    beta2: Annotated[Real, Field(ge=0, lt=1)] = Field(Real("0.999"), description="decay of the second moment")
    eps: Positive = Field(Real("1e-8"), description="added to the denominator")
    weight_decay: NotNegative = Field(Real("0.01"), description="decoupled weight decay")


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="name")]


class _Warm(Section):
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up from 0")


class Constant(_Warm):
    """Factor 1 throughout."""

    name: Literal["constant"] = "constant"


class Piecewise(_Warm):
    """Multiplied by `factor` at each milestone."""

    name: Literal["piecewise"] = "piecewise"
    milestones: list[Annotated[Real, Field(gt=0, lt=1)]] = Field(
        [Real("1/2"), Real("3/4")], max_length=100, description="shares of the run, increasing"
    )
    factor: Positive = Field(Real("0.1"), description="what the learning rate is multiplied by at each milestone")

    @model_validator(mode="after")
    def _increasing(self) -> Piecewise:
        if any(a >= b for a, b in pairwise(self.milestones)):
            raise ValueError("milestones must increase")
        return self


class Linear(_Warm):
    """Straight lines between points (share of the run, factor)."""

    name: Literal["linear"] = "linear"
    points: list[Annotated[list[NotNegative], Field(min_length=2, max_length=2)]] = Field(
        [[Real(0), Real(1)], [Real(1), Real(0)]], min_length=2, max_length=100, description="[share of the run, factor]"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Linear:
        shares = [float(point[0]) for point in self.points]
        if (shares[0], shares[-1]) != (0, 1) or any(a >= b for a, b in pairwise(shares)):
            raise ValueError("points go from share 0 to share 1 and increase")
        return self


class Cosine(_Warm):
    """Half a cosine from 1 to `final`."""

    name: Literal["cosine"] = "cosine"
    final: Share = Field(Real(0), description="factor at the end")


class OneCycle(_Warm):
    """Up along half a cosine from `start` to 1 at share `peak`, then down to `final`."""

    name: Literal["one_cycle"] = "one_cycle"
    peak: Annotated[Real, Field(gt=0, lt=1)] = Field(
        Real("0.3"), description="share of the run at which the factor is 1"
    )
    start: Share = Field(Real("0.04"), description="factor at the start")
    final: Share = Field(Real("1e-4"), description="factor at the end")


Schedule = Annotated[Constant | Piecewise | Linear | Cosine | OneCycle, Field(discriminator="name")]


class Checkpointing(Section):
    """When the exact state is committed to the store. The best and the last are always kept."""

    every: Every = Field(
        Every(epochs=1), description="interval between commits; a new best and the end are committed too"
    )
    keep: int = Field(2, ge=1, le=10_000, description="newest checkpoints kept, beside the best")


class TrainSpec(Section):
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
        description="batches whose mean gradient makes one optimizer step; an epoch's last step takes those left",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: forward passes under autocast, fp32 weights")
    checkpoint: Checkpointing = Field(Checkpointing(), description="when the state is committed")
    evaluate_every: Every = Field(Every(epochs=1), description="interval between evaluations on the validation split")
    log_every: int = Field(10, ge=1, le=10_000, description="optimizer steps averaged into one row of metrics")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    def plan(self, batches: int, repeats: int = 1) -> EpochPlan:
        """Which of the `batches` of an epoch each step learns from."""
        return EpochPlan(batches, self.accumulate, repeats)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or (self.epochs or 0) * steps_per_epoch
