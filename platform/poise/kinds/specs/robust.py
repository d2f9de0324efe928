"""`kind: robust.train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from poise.data.spec import DataSpec, known_sizes
from poise.kinds.specs.cost import in_bytes
from poise.models.spec import ModelSpec, num_parameters, state_bytes
from poise.robust.objective_spec import Adt, Objective, check, gradients_per_batch, losses_per_batch
from poise.robust.spec import EvaluateSpec, Threats
from poise.spec import RunSpec, mistake
from poise.train.spec import TrainSpec

__all__ = ["RobustTrainSpec"]


class RobustTrainSpec(RunSpec):
    """Adversarial training of an image classifier under one or several norms, and its evaluation under attack."""

    kind: Literal["robust.train"]
    model: ModelSpec = Field(description="architecture")
    data: DataSpec = Field(description="data set, batches and augmentation")
    threats: Threats = Field(description="attacks that the network is trained under, by norm")
    objective: Objective = Field(Adt(), description="how the losses under the attacks become one")
    train: TrainSpec = Field(description="length, optimizer, schedule, checkpoints")
    evaluate: EvaluateSpec = Field(EvaluateSpec(), description="attacks that the trained network is measured under")

    @model_validator(mode="after")
    def _fits(self) -> RobustTrainSpec:
        try:
            check(self.objective, self.threats)
        except ValueError as error:
            raise mistake("threats", str(error)) from None
        self.workers.check_shares("data.batch_size", self.data.batch_size)
        return self

    def cost(self) -> list[str]:
        """Gradients, steps and bytes. Raises UserError when the images are too small for the model."""
        attack = gradients_per_batch(self.objective, self.threats)
        loss = losses_per_batch(self.objective, self.threats)
        lines = [f"gradients per batch of {self.data.batch_size}: {attack} for attacks, {loss} for the loss"]
        sizes = known_sizes(self.data)
        if sizes is None:
            return [*lines, "steps, parameters and bytes: known when the data set is read"]
        weights = num_parameters(self.model, sizes.shape, sizes.classes)
        state = state_bytes(self.model, sizes.shape, sizes.classes)
        checkpoint = state + 4 * weights * (1 if self.train.optimizer.name == "sgd" else 2)
        steps_per_epoch = max(1, sizes.train // self.data.batch_size // self.train.accumulate)
        steps = self.train.total_steps(steps_per_epoch)
        images = steps * self.train.accumulate * self.data.batch_size
        total = (self.train.checkpoint.keep + 1) * checkpoint
        return [
            *lines,
            f"{steps:,} optimizer steps, {steps / steps_per_epoch:.4g} epochs of {sizes.train:,} images: "
            f"{images:,} images",
            f"{images * (attack + loss):,} image gradients in all, evaluation not counted",
            f"{weights:,} parameters; {in_bytes(checkpoint)} per checkpoint, {in_bytes(total)} kept at most",
            f"{self.workers.count} workers of {self.workers.cpus} CPU and {self.workers.gpus} GPU",
        ]
