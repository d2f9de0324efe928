"""`kind: finetune.sft`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.data.text.spec import TextSpec
from poise.finetune.losses import Ce, FinetuneLoss, LossSpec
from poise.models.spec import LanguageModelSpec
from poise.models.tuning import Full, TuningSpec
from poise.spec import (
    ExactNumber,
    ExtraMetrics,
    MetricSource,
    RunSpec,
    extra_names,
    field_error,
    row_sources,
    summary_sources,
)
from poise.train.spec import TrainSpec

__all__ = ["FinetuneSftSpec"]


class FinetuneSftSpec(RunSpec):
    """Supervised training of a language model on prompts and completions, from scratch or from another model."""

    kind: Literal["finetune.sft"]
    model: LanguageModelSpec = Field(description="where the training starts from")
    data: TextSpec = Field(description="prompts, and the completions that are supervised")
    batch_size: int = Field(32, ge=1, le=65_536, description="training examples per batch, over all workers together")
    loss: LossSpec = Field(Ce(), description="what is minimised, a mean over the tokens of each optimizer step")
    neftune_alpha: Annotated[ExactNumber, Field(gt=0, le=1000)] | None = Field(
        None,
        description="NEFTune: largest noise on the embeddings in training, times sqrt(tokens * width); 5 is usual",
    )
    tuning: TuningSpec = Field(Full(), description="which weights are trained: all, or low-rank adapters")
    train: TrainSpec = Field(description="length, optimizer, schedule, checkpoints")
    extra_metrics: ExtraMetrics = Field(
        {},
        description="by name, functions in your code of (model, batch) on held-out examples; measured as `metric/NAME` "
        "at every evaluation",
    )
    export: Literal["final", "best"] = Field(
        "final",
        description="which weights are exported as the run's model; best: of the lowest validation cross entropy",
    )

    @model_validator(mode="after")
    def _fits(self) -> FinetuneSftSpec:
        if self.model.name is not None and self.data.known_world is None:
            raise field_error(
                "model.name", "a new model takes its words from a world; for files name a `run` or `folder`"
            )
        if self.extra_metrics and not self.data.has_validation:
            raise field_error("extra_metrics", "are measured on held-out examples: set data.validation above 0")
        self.workers.check_shares("batch_size", self.batch_size)
        return self

    def describe_loss(self, loss: FinetuneLoss) -> str:
        """The loss, as it was prepared, and its options, such as "ce, neftune 5"."""
        noise = "" if self.neftune_alpha is None else f", neftune {self.neftune_alpha}"
        return loss.describe() + noise

    def metrics(self) -> dict[str, MetricSource]:
        """Losses in training, on held-out examples and, in a world, against its true answers."""
        training = row_sources(["loss", *self.loss.training_metrics], "train")
        if not self.data.has_validation:
            return training
        world = ("answer_ce", "excess", "answer_entropy", "outside") if self.data.known_world is not None else ()
        names = ("ce", "entropy", *world, *extra_names(self.extra_metrics))
        at_the_end = summary_sources(["measured"], names, "validation")
        return training | at_the_end | row_sources(names, "validation", during=True)

    def cost(self) -> list[str]:
        """Steps and examples, where the data is known before it is read."""
        workers = f"{self.workers.count} workers of {self.workers.cpus} CPU and {self.workers.gpus} GPU"
        examples = self.data.num_known_examples
        if examples is None:
            return ["steps and tokens: known when the data is read", workers]
        plan = self.train.plan(examples // self.batch_size)
        steps = self.train.total_steps(plan.steps)
        return [
            f"{steps:,} optimizer steps, {steps / plan.steps:.4g} epochs of {examples:,} examples: "
            f"{plan.batches_before(steps) * self.batch_size:,} examples",
            workers,
        ]
