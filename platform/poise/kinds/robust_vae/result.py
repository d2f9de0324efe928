"""The result of training an autoencoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from poise.kinds.common.trained_result import TrainedResult
from poise.store.result import Score

__all__ = ["RobustVaeResult"]


class RobustVaeResult(TrainedResult):
    """Means per test image, in nats: "elbo", "reconstruction" and "kl"; "error" is the mean squared pixel error."""

    kind: Literal["robust.vae"] = "robust.vae"
    split: Literal["test"] = "test"
    measured: dict[str, Score] = Field(description="by measure")
