"""Tuning of all weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from poise.models.tuning.base import Tuning

__all__ = ["Full"]


class Full(Tuning):
    """All weights are tuned."""

    name: Literal["full"] = Field("full", description="tune all weights")

    def prepare(self, model: nn.Module) -> list[str]:
        """Nothing has to be prepared."""
        return []

    def add_adapters(self, model: nn.Module, seed: int) -> nn.Module:
        """The model itself."""
        return model

    def merge_adapters(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model
