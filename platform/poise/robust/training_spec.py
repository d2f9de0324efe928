"""The sections of a spec that apply to any objective: weight averages, weight perturbation, monitors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.robust.training.averaging import Average, MoreauEnvelope, WeightAverage
from poise.spec import ExactNumber, Interval, SpecModel

__all__ = ["Averaging", "Awp", "Compute", "Ema", "Mea", "Monitors", "Overfitting", "Swa"]

_Decay = Annotated[ExactNumber, Field(ge=0, lt=1)]
_Fraction = Annotated[ExactNumber, Field(ge=0, le=1)]

_DECAY = "share of the old average that one move keeps"
_WARM_UP = "the t-th move keeps at most (1 + t) / (10 + t)"


class _AverageSpec(SpecModel, ABC):
    start: Interval | None = Field(
        default=None, description="epochs or steps before averaging begins; default: with the first step"
    )

    @abstractmethod
    def build(self, start: int, every: int) -> Average:
        """The average that begins after `start` optimizer steps and moves every `every` steps."""


class Swa(_AverageSpec):
    """The equal average of iterates."""

    name: Literal["swa"] = Field(default="swa", description="equal average of the weights, once every interval")
    every: Interval = Field(default=Interval(epochs=1), description="interval between two weights that are averaged")

    def build(self, start: int, every: int) -> Average:
        """The equal average."""
        return WeightAverage("swa", start, every)


class Ema(_AverageSpec):
    """The exponential moving average of iterates."""

    name: Literal["ema"] = Field(default="ema", description="exponential moving average of the weights")
    every: Interval = Field(default=Interval(steps=1), description="interval between two moves of the average")
    decay: _Decay = Field(default=ExactNumber("0.995"), description=_DECAY)
    warm_up: bool = Field(default=True, description=_WARM_UP)

    def build(self, start: int, every: int) -> Average:
        """The moving average."""
        return WeightAverage("ema", start, every, decay=float(self.decay), warm_up=self.warm_up)


class Mea(_AverageSpec):
    """The Moreau envelope algorithm."""

    name: Literal["mea"] = Field(
        default="mea", description="Moreau envelope: training is pulled to an anchor, which moves towards the weights"
    )
    every: Interval = Field(default=Interval(epochs=1), description="interval between two moves of the anchor")
    proximal_weight: Annotated[ExactNumber, Field(ge=0, le=1_000_000)] = Field(
        default=ExactNumber("5e-4"),
        description="p of the proximal term: p/2 times the squared distance to the anchor; 0: none",
    )
    rule: Literal["swa", "const", "ema"] = Field(
        default="swa", description="size of the t-th move of the anchor: 1/t, `rate`, or as an EMA with `decay`"
    )
    rate: Annotated[ExactNumber, Field(gt=0, le=2)] = Field(
        default=ExactNumber("1/2"), description="const only: size of a move, as a share of the distance to the weights"
    )
    decay: _Decay = Field(default=ExactNumber("0.995"), description=f"ema only: {_DECAY}")
    warm_up: bool = Field(default=True, description=f"ema only: {_WARM_UP}")

    @model_validator(mode="after")
    def _keys_match_rule(self) -> Mea:
        for key, rule in {"rate": "const", "decay": "ema", "warm_up": "ema"}.items():
            changed = getattr(self, key) != type(self).model_fields[key].default  # a resolved spec has every key
            if changed and self.rule != rule:
                raise ValueError(f"{key} belongs to rule `{rule}`: remove it, or set the rule")
        return self

    def build(self, start: int, every: int) -> Average:
        """The anchor, with the proximal term that pulls the weights towards it."""
        anchor = WeightAverage(
            self.rule, start, every, decay=float(self.decay), warm_up=self.warm_up, rate=float(self.rate)
        )
        return MoreauEnvelope(float(self.proximal_weight), anchor)


Averaging = Annotated[Swa | Ema | Mea, Field(discriminator="name")]


class Awp(SpecModel):
    """Adversarial weight perturbation around the objective."""

    gamma: _Fraction = Field(
        default=ExactNumber("0.01"), description="length of the perturbation of a weight matrix, in units of its norm"
    )
    start: Interval | None = Field(
        default=None, description="epochs or steps before weights are perturbed; default: from the first step"
    )


class Compute(SpecModel):
    """How the attacks of training are computed. These options change speed and rounding, not the algorithm."""

    fused: bool = Field(
        default=True, description="attack with all threats in one batch, where their attacks take equal steps"
    )
    compile: bool = Field(
        default=False, description="compile the network for the attacks (torch.compile): a slow first step, then faster"
    )


class Overfitting(SpecModel):
    """An alarm for catastrophic overfitting, on a fixed batch of training images, under the first threat."""

    num_examples: int = Field(default=256, ge=1, le=65_536, description="training images that are monitored")
    steps: int = Field(default=10, ge=1, le=1000, description="steps of the PGD attack that FGSM is compared with")
    gap: _Fraction = Field(
        default=ExactNumber("1/4"), description="alarm when FGSM accuracy exceeds PGD accuracy by more than this"
    )
    max_drop: _Fraction = Field(
        default=ExactNumber("1/5"),
        description="alarm when PGD accuracy drops by more than this from one evaluation to the next",
    )
    stop: Literal["never", "restore"] = Field(
        default="never", description="restore: an alarm ends the run, which goes back to its newest checkpoint"
    )


class Monitors(SpecModel):
    """Further measurements at each evaluation, beside the validation."""

    robust_gap: bool = Field(
        default=False,
        description="robust accuracy on as many training images minus that on the validation split, same attacks",
    )
    overfitting: Overfitting | None = Field(default=None, description="alarm of catastrophic overfitting; `{}`: on")
