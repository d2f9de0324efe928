"""`kind: align.selfplay`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from poise.align.oracles import OracleSpec
from poise.align.selfplay import MethodSpec
from poise.data.text.question_spec import QuestionsSpec, WorldQuestions
from poise.kinds.common.cost import UNCHECKED_COST
from poise.models.spec import LanguageModelSpec
from poise.spec import MetricSource, RunSpec, SamplerSpec, field_error, row_sources, summary_sources
from poise.spec.registry import is_unchecked
from poise.train.spec import TrainSpec

__all__ = ["AlignSelfplaySpec"]


class AlignSelfplaySpec(RunSpec):
    """Self-play of a language model under a preference oracle, towards an equilibrium of the game between answers.

    An epoch of `train` is an iteration: responses are drawn, compared, and learned from in `method.inner_steps` steps.
    """

    kind: Literal["align.selfplay"]
    model: LanguageModelSpec = Field(description="the initial policy, which is also the first magnet or reference")
    questions: QuestionsSpec = Field(description="the questions; the oracle ranks the first answers of each")
    oracle: OracleSpec = Field(description="which of two answers is preferred")
    method: MethodSpec = Field(description="how the policy learns from preferences")
    prompts: int = Field(16, ge=1, le=65_536, description="questions per iteration, over all workers together")
    rollouts: int = Field(8, ge=2, le=4096, description="responses per question that are learned from")
    max_tokens: int = Field(
        16, ge=1, le=1_000_000, description="longest response, in tokens; a longer one is truncated and loses"
    )
    sampler: SamplerSpec = Field(SamplerSpec(), description="the engines that generate the responses, at temperature 1")
    train: TrainSpec = Field(description="length, optimizer, schedule, checkpoints; an epoch is an iteration")

    @model_validator(mode="after")
    def _fits(self) -> AlignSelfplaySpec:
        if self.model.name is not None:
            raise field_error("model.name", "self-play starts from a model that can answer: name a `run` or a `folder`")
        if isinstance(self.questions, WorldQuestions) and self.questions.split != "prefer":
            raise field_error("questions.split", "only the questions of the split `prefer` have three answers each")
        if self.prompts % self.train.accumulate:
            raise field_error("prompts", f"{self.prompts} does not divide by train.accumulate {self.train.accumulate}")
        self.workers.check_shares("prompts", self.prompts // self.train.accumulate)
        self._whole_iterations()
        return self

    def _whole_iterations(self) -> None:
        """Refuse lengths and intervals that end within an iteration: its responses are in no checkpoint."""
        train = self.train
        inner = self.method.inner_steps
        for path, steps in (
            ("train.steps", train.steps),
            ("train.checkpoint.every.steps", train.checkpoint.every.steps),
            ("train.evaluate_every.steps", train.evaluate_every.steps),
        ):
            if steps is not None and steps % inner:
                raise field_error(path, f"{steps} steps are no whole iterations of method.inner_steps {inner}")

    def metrics(self) -> dict[str, MetricSource]:
        """The policy in its game, from the probability of every listed answer, and what is measured in training."""
        training = ["loss", "preference", "truncated", "gap", *self.method.training_metrics]
        names = ["exploitability", "distance", "outside"]
        names += [] if self.method.equilibrium_tau is None else ["distance_regularised"]
        at_the_end = summary_sources(["final"], names, "validation")
        return row_sources(training, "train") | at_the_end | row_sources(names, "validation", during=True)

    @property
    def iterations(self) -> int:
        """The number of iterations: how often responses are drawn."""
        return self.train.total_steps(self.method.inner_steps) // self.method.inner_steps

    def cost(self) -> list[str]:
        """Responses and comparisons."""
        if is_unchecked(self.method):
            return [UNCHECKED_COST]
        requests = self.iterations * self.prompts
        opponents = self.method.num_opponents
        proposals = self.method.num_proposals
        responses = requests * (self.rollouts + opponents)
        once = f", and {proposals} proposals per question once" if proposals else ""
        # A method without opponents and proposals compares rollouts.
        judgements = requests * self.rollouts * (opponents + proposals or self.rollouts)
        return [
            f"{self.iterations:,} iterations of {self.method.inner_steps} steps on {self.prompts} questions: "
            f"{responses:,} responses of at most {self.max_tokens} tokens{once}",
            f"{judgements:,} judgements",
            f"{self.workers.count} workers of {self.workers.cpus} CPU and {self.workers.gpus} GPU, "
            f"{self.sampler.engines} engines of {self.sampler.backend}",
        ]
