"""Intervals of a training, in epochs or in steps."""

from __future__ import annotations

from pydantic import Field, model_validator

from poise.spec.base import SpecModel

__all__ = ["Interval"]


class Interval(SpecModel):
    """An interval, in epochs or in optimizer steps."""

    epochs: int | None = Field(None, ge=1, le=10**6, description="length in epochs")
    steps: int | None = Field(None, ge=1, le=10**9, description="length in optimizer steps")

    @model_validator(mode="after")
    def _one(self) -> Interval:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    def in_steps(self, steps_per_epoch: int) -> int:
        """The length of the interval in optimizer steps."""
        return self.steps or (self.epochs or 1) * steps_per_epoch
