"""`kind: robust.vae`."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from poise.data.images.spec import DataSpec, known_sizes
from poise.kinds.common.cost import in_bytes
from poise.models.sizes import count_parameters
from poise.models.spec import VaeSpec
from poise.models.vae import ConditionalVae
from poise.spec import MetricSource, RunSpec, row_sources, summary_sources
from poise.train.spec import TrainSpec

__all__ = ["RobustVaeSpec"]


class RobustVaeSpec(RunSpec):
    """Training of a conditional variational autoencoder, for attacks on the manifold through its decoder."""

    kind: Literal["robust.vae"]
    model: VaeSpec = Field(VaeSpec(), description="size of the autoencoder")
    data: DataSpec = Field(description="data set, batches and augmentation")
    train: TrainSpec = Field(description="length, optimizer, schedule, checkpoints")

    @model_validator(mode="after")
    def _fits(self) -> RobustVaeSpec:
        self.workers.check_shares("data.batch_size", self.data.batch_size)
        return self

    def metrics(self) -> dict[str, MetricSource]:
        """The evidence lower bound and its parts."""
        names = ("elbo", "reconstruction", "kl", "error")
        at_the_end = summary_sources(["measured"], names, "test")
        if self.data.validation == 0:
            return row_sources(["loss"], "train") | at_the_end | row_sources(names, "test")
        return row_sources(["loss"], "train") | at_the_end | row_sources(names, "validation", during=True)

    def cost(self) -> list[str]:
        """Steps, images and bytes."""
        sizes = known_sizes(self.data)
        if sizes is None:
            return ["steps, parameters and bytes: known when the data set is read"]
        with torch.device("meta"):
            network = ConditionalVae(self.model, sizes.shape, sizes.classes)
        weights = count_parameters(network)
        steps_per_epoch = self.train.plan(sizes.train // self.data.batch_size).steps
        steps = self.train.total_steps(steps_per_epoch)
        return [
            f"{steps:,} optimizer steps, {steps / steps_per_epoch:.4g} epochs of {sizes.train:,} images",
            f"{weights:,} parameters, {in_bytes(4 * weights)}",
        ]
