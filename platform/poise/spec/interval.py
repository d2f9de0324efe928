"""How often something happens in a training."""

from __future__ import annotations

from pydantic import Field, model_validator

from poise.spec.base import Section

__all__ = ["Every"]


class Every(Section):
    """An interval, in epochs or in optimizer steps."""

    epochs: int | None = Field(None, ge=1, le=10**6, description="epochs between two")
    steps: int | None = Field(None, ge=1, le=10**9, description="optimizer steps between two")

    @model_validator(mode="after")
    def _one(self) -> Every:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    def in_steps(self, steps_per_epoch: int) -> int:
        """The interval in optimizer steps."""
        return self.steps or (self.epochs or 1) * steps_per_epoch
