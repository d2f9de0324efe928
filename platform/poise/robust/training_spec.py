"""The sections of a spec that go round any objective: averages, perturbed weights, monitors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.spec import Every, Real, Section

__all__ = ["Averaging", "Awp", "Compute", "Ema", "Mea", "Monitors", "Overfitting", "Swa"]

_Decay = Annotated[Real, Field(ge=0, lt=1)]
_Fraction = Annotated[Real, Field(ge=0, le=1)]

_DECAY = "share of the average that one move keeps"
_WARM_UP = "the t-th move keeps at most (1 + t) / (10 + t)"


class _Average(Section):
    start: Every | None = Field(
        default=None, description="epochs or steps before averaging begins; default: with the first step"
    )


class Swa(_Average):
    """The equal average of iterates."""

    name: Literal["swa"] = Field(default="swa", description="equal average of the weights, once every interval")
    every: Every = Field(default=Every(epochs=1), description="interval between two weights that are averaged")


class Ema(_Average):
    """The exponential moving average of iterates."""

    name: Literal["ema"] = Field(default="ema", description="exponential moving average of the weights")
    every: Every = Field(default=Every(steps=1), description="interval between two moves of the average")
    decay: _Decay = Field(default=Real("0.995"), description=_DECAY)
    warm_up: bool = Field(default=True, description=_WARM_UP)


class Mea(_Average):
    """The Moreau envelope algorithm."""

    name: Literal["mea"] = Field(
        default="mea", description="Moreau envelope: training is pulled to an anchor, which moves towards the weights"
    )
    every: Every = Field(default=Every(epochs=1), description="interval between two moves of the anchor")
    pull: Annotated[Real, Field(ge=0, le=1_000_000)] = Field(
        default=Real("5e-4"), description="p of the penalty: p/2 times the squared distance to the anchor; 0: none"
    )
    rule: Literal["swa", "const", "ema"] = Field(
        default="swa", description="how far the t-th move of the anchor goes: 1/t, `rate`, or as an EMA with `decay`"
    )
    rate: Annotated[Real, Field(gt=0, le=2)] = Field(
        default=Real("1/2"), description="const only: share of the way to the weights that a move goes"
    )
    decay: _Decay = Field(default=Real("0.995"), description=f"ema only: {_DECAY}")
    warm_up: bool = Field(default=True, description=f"ema only: {_WARM_UP}")

    @model_validator(mode="after")
    def _of_its_rule(self) -> Mea:
        for key, rule in {"rate": "const", "decay": "ema", "warm_up": "ema"}.items():
            changed = getattr(self, key) != type(self).model_fields[key].default  # a resolved spec has every key
            if changed and self.rule != rule:
                raise ValueError(f"{key} belongs to rule `{rule}`: remove it, or set the rule")
        return self


Averaging = Annotated[Swa | Ema | Mea, Field(discriminator="name")]


class Awp(Section):
    """Adversarial weight perturbation round the objective."""

    gamma: _Fraction = Field(
        default=Real("0.01"), description="length of the perturbation of a weight matrix, in units of its norm"
    )
    start: Every | None = Field(
        default=None, description="epochs or steps before weights are perturbed; default: from the first step"
    )


class Compute(Section):
    """How the attacks of training are computed: what changes speed and rounding, never what is computed."""

    fused: bool = Field(
        default=True, description="attack with all threats in one batch, where their attacks take equal steps"
    )
    compile: bool = Field(
        default=False, description="compile the network for the attacks (torch.compile): a slow first step, then faster"
    )


class Overfitting(Section):
    """The alarm of catastrophic overfitting, on a fixed batch of training images, under the first threat."""

    examples: int = Field(default=256, ge=1, le=65_536, description="training images that are looked at")
    steps: int = Field(default=10, ge=1, le=1000, description="steps of the PGD that FGSM is compared with")
    gap: _Fraction = Field(default=Real("1/4"), description="alarm when FGSM accuracy exceeds PGD accuracy by more")
    fall: _Fraction = Field(
        default=Real("1/5"), description="alarm when PGD accuracy is lower by more than at the evaluation before"
    )
    stop: Literal["never", "restore"] = Field(
        default="never", description="restore: an alarm ends the run, which goes back to its newest checkpoint"
    )


class Monitors(Section):
    """What is watched at each evaluation, beside the validation."""

    robust_gap: bool = Field(
        default=False,
        description="robust accuracy on as many training images minus that on the validation split, equal attacks",
    )
    overfitting: Overfitting | None = Field(default=None, description="alarm of catastrophic overfitting; `{}`: on")
