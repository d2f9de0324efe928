"""`kind: calibrate.measure`."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from poise.data.spec import QuestionsSpec, WorldQuestions
from poise.models.spec import DecodingSpec, LanguageModelSpec
from poise.spec import MetricSource, RunSpec, SamplerSpec, mistake, row_sources

__all__ = ["CalibrateMeasureSpec"]

_ERRORS = ("confidence", "bias", "ece", "debiased_ece", "smooth_ece", "brier", "auroc")
_MEASURES = [
    "accuracy",
    *(f"{confidence}/{error}" for confidence in ("sem1", "sem2") for error in _ERRORS),
    *(f"difference/{error}" for error in ("confidence", "ece")),
]
_BRACES = re.compile(r"(?:\\[A-Za-z]+|[\^_])(?:\{[^{}]*\})+|\{([A-Za-z_]\w*)\}")
"""Braces in a prompt; group 1 is a single word in them, taken for a placeholder. Arguments of LaTeX, such as
`\\boxed{x}` and `x_{i}`, and braces round anything else, as in JSON, are text."""
_AGAINST_THE_TRUTH = [f"true/{error}" for error in ("confidence", "ece", "error", "sem1_bias", "sem2_bias")]


class CalibrateMeasureSpec(RunSpec):
    """How well the confidence of a language model, the agreement of its own answers, tells whether it is right."""

    shares_batches: ClassVar[bool] = False

    kind: Literal["calibrate.measure"]
    model: LanguageModelSpec = Field(description="what is measured: a `run` or a `folder`")
    questions: QuestionsSpec = Field(description="what is asked, and what counts as correct")
    samples: int = Field(50, ge=2, le=10_000, description="answers to each question")
    prompt: str = Field("{question}", description="text that the model continues; {question} stands for the question")
    answer: Literal["whole", "line"] = Field(
        "whole", description="what counts of a response: all of it, or the rest of the line of its last `Answer:`"
    )
    decoding: DecodingSpec = Field(DecodingSpec(), description="how the answers are drawn")
    sampler: SamplerSpec = Field(SamplerSpec(), description="what draws them")
    bins: int = Field(10, ge=1, le=1000, description="bins of equal width of the calibration errors")
    bootstrap: int = Field(1000, ge=1, le=100_000, description="draws and resamples behind each interval")

    @model_validator(mode="after")
    def _fits(self) -> CalibrateMeasureSpec:
        if self.model.name is not None:
            raise mistake("model.name", "a new model knows nothing that could be measured; name a `run` or `folder`")
        if "{question}" not in self.prompt:
            raise mistake("prompt", "the question is asked nowhere: write {question} where it belongs")
        unknown = sorted({name for name in _BRACES.findall(self.prompt) if name not in ("", "question")})
        if unknown:
            held = ", ".join(f"{{{name}}}" for name in unknown)
            reason = f"nothing is known to fill in for {held}; the only placeholder is {{question}}"
            raise mistake("prompt", f"{reason}. Braces that are meant as text need a space inside: {{ word }}")
        if not self.decoding.temperature:
            raise mistake("decoding.temperature", "at 0 all answers to a question agree, whatever the model believes")
        if self.workers.count > 1:
            raise mistake("workers.count", "one worker asks all questions; for speed, set sampler.engines")
        return self

    def metrics(self) -> dict[str, MetricSource]:
        """Accuracy, confidence and calibration errors over the questions."""
        as_it_is = float(self.decoding.temperature) == float(self.decoding.top_p) == 1
        exact = as_it_is and isinstance(self.questions, WorldQuestions)
        known = _MEASURES + (_AGAINST_THE_TRUTH if exact else [])
        return row_sources(known, "test") | {"coverage": MetricSource("test", None)}

    def cost(self) -> list[str]:
        """Answers and tokens, where the questions are known before they are read."""
        engines = f"{self.sampler.engines} {self.sampler.backend} engines of {self.sampler.cpus} CPU"
        engines += f" and {self.sampler.gpus} GPU"
        if not isinstance(self.questions, WorldQuestions) or self.questions.split != "evaluate":
            return [f"{self.samples} answers to each question, of at most {self.decoding.max_tokens} tokens", engines]
        asked = self.questions.world.num_questions
        answers = asked * self.samples
        return [
            f"{asked:,} questions, {answers:,} answers, at most {answers * self.decoding.max_tokens:,} tokens",
            engines,
        ]
