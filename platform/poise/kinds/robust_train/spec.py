"""`kind: robust.train`."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from poise.data.images.spec import DataSpec, known_sizes
from poise.kinds.common.cost import UNCHECKED_COST, in_bytes
from poise.models.build import build_on_meta
from poise.models.sizes import count_parameters, state_bytes
from poise.models.spec import ModelSpec
from poise.robust.objectives import ObjectiveSpec
from poise.robust.objectives.adt import Adt
from poise.robust.spec import Eigenspace, EvaluateSpec, Threats, oversized
from poise.robust.training_spec import Averaging, Awp, Compute, Monitors
from poise.spec import MetricSource, RunSpec, extra_names, field_error, row_sources, summary_sources
from poise.spec.registry import is_unchecked
from poise.train.spec import TrainSpec

__all__ = ["RobustTrainSpec"]


class RobustTrainSpec(RunSpec):
    """Adversarial training of an image classifier under one or several norms, and its evaluation under attack."""

    kind: Literal["robust.train"]
    model: ModelSpec = Field(description="architecture")
    data: DataSpec = Field(description="data set, batches and augmentation")
    threats: Threats = Field(description="attacks that the network is trained under, by norm")
    eigenspace: Eigenspace | None = Field(
        None, description="subspace of the perturbations in training; validation and test search the whole balls"
    )
    objective: ObjectiveSpec = Field(Adt(), description="how the losses under the attacks are combined")
    train: TrainSpec = Field(description="length, optimizer, schedule, checkpoints")
    averaging: Averaging | None = Field(
        None, description="average of the weights, evaluated in addition to the best and final ones"
    )
    awp: Awp | None = Field(None, description="adversarial perturbation of the weights, for any objective")
    compute: Compute = Field(Compute(), description="how the attacks are computed: speed and rounding")
    monitors: Monitors = Field(Monitors(), description="what is monitored at each evaluation")
    evaluate: EvaluateSpec = Field(EvaluateSpec(), description="attacks that the trained network is measured under")

    @model_validator(mode="after")
    def _fits(self) -> RobustTrainSpec:
        try:
            self.objective.check(self.threats)
        except ValueError as error:
            raise field_error("threats", str(error)) from None
        sizes = known_sizes(self.data)
        for key, threats in (("threats", self.threats), ("evaluate.threats", self.evaluate.threats)):
            for norm, threat in threats.items() if threats else ():
                problem = oversized(norm, float(threat.eps), sizes and math.prod(sizes.shape))
                if problem:
                    raise field_error(f"{key}.{norm}.eps", problem)
        self.workers.check_shares("data.batch_size", self.data.batch_size)
        if self.monitors.robust_gap and self.data.validation == 0:
            raise field_error("monitors.robust_gap", "needs a validation split: set data.validation above 0")
        if self.evaluate.validation and self.data.validation == 0:
            raise field_error("evaluate.validation", "needs a validation split: set data.validation above 0")
        return self

    def metrics(self) -> dict[str, MetricSource]:
        """The loss in training, accuracies on the validation split, and those of the checkpoints at the end."""
        training_measures = _accuracies(self.threats)
        test_measures = _accuracies(self.evaluate.threats or self.threats)
        weights = ["best", "final", *(["averaged"] if self.averaging else [])]
        loss = row_sources(["loss", *self.objective.training_metrics], "train")
        at_the_end = summary_sources([f"accuracy.{name}" for name in weights], test_measures, "test", "evaluation")
        extra = extra_names(self.evaluate.extra_metrics)
        at_the_end |= summary_sources([f"extra_metrics.{name}" for name in weights], extra, "test")
        at_the_end |= row_sources(extra, "test") if self.data.validation == 0 else {}
        if self.data.validation == 0:
            return loss | at_the_end | row_sources(test_measures, "test", attacks="evaluation")
        gaps = []
        if self.monitors.robust_gap:
            gaps = [f"gap/{name.removeprefix('robust/')}" for name in training_measures]
        validation = row_sources([*training_measures, *gaps], "validation", during=True, attacks="training")
        validation |= row_sources(extra, "validation", during=True)
        needs = "" if self.evaluate.validation else "evaluate.validation: true"
        sections = [f"validation.{name}" for name in weights]
        validation |= summary_sources(sections, test_measures, "validation", "evaluation", needs)
        return loss | at_the_end | validation

    @property
    def steps_per_batch(self) -> int:
        """Consecutive optimizer steps on each batch."""
        return self.objective.steps_per_batch(self.threats)

    def steps_per_epoch(self, batches: int) -> int:
        """Optimizer steps of an epoch of so many batches."""
        return self.train.plan(batches, self.steps_per_batch).steps

    def cost(self) -> list[str]:
        """Gradients, steps and bytes. Raises UserError when the images are too small for the model."""
        if is_unchecked(self.objective):
            return [UNCHECKED_COST]
        attack = self.objective.gradients_per_batch(self.threats)
        loss = self.objective.losses_per_batch(self.threats) * (2 if self.awp and self.awp.gamma else 1)
        lines = [f"gradients per batch of {self.data.batch_size}: {attack} for attacks, {loss} for the loss"]
        sizes = known_sizes(self.data)
        if sizes is None:
            return [*lines, "steps, parameters and bytes: known when the data set is read"]
        plan = self.train.plan(sizes.train // self.data.batch_size, self.steps_per_batch)
        steps = self.train.total_steps(plan.steps)
        images = plan.batches_before(steps) * self.data.batch_size
        lines += [
            f"{steps:,} optimizer steps, {steps / plan.steps:.4g} epochs of {sizes.train:,} images: {images:,} images",
            f"{images * (attack + loss):,} image gradients in all, evaluation not counted",
        ]
        workers = f"{self.workers.count} workers of {self.workers.cpus} CPU and {self.workers.gpus} GPU"
        if self.model.function is not None:
            return [*lines, "parameters and bytes: known when your function has made the network", workers]
        network = build_on_meta(self.model, shape=sizes.shape, classes=sizes.classes)
        weights = count_parameters(network)
        state = state_bytes(network)
        moments = 1 if self.train.optimizer.name == "sgd" else 2
        average = self.averaging is not None
        checkpoint = state * (1 + self.objective.copies_of_model) + 4 * weights * (moments + average)
        total = (self.train.checkpoint.keep + 1) * checkpoint
        return [
            *lines,
            f"{weights:,} parameters; {in_bytes(checkpoint)} per checkpoint, {in_bytes(total)} kept at most",
            workers,
        ]


def _accuracies(threats: Threats) -> list[str]:
    """The measures of an evaluation under these threats, clean ones first."""
    return ["clean", *(f"robust/{norm}" for norm, _ in threats.items()), "robust/average", "robust/union"]
