"""`kind: calibrate.measure`."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from poise.calibrate.clustering import ClustererSpec, ExactMatch
from poise.data.text.question_spec import QuestionsSpec
from poise.models.spec import DecodingSpec, LanguageModelSpec
from poise.spec import MetricSource, RunSpec, SamplerSpec, field_error, row_sources

__all__ = ["CalibrateMeasureSpec"]

_ERRORS = ("confidence", "bias", "ece", "debiased_ece", "smooth_ece", "brier", "auroc")
_MEASURES = [
    "accuracy",
    *(f"sem1/{error}" for error in _ERRORS),
    *(f"sem2/{error}" for error in _ERRORS),
    "difference/confidence",
    "difference/ece",
]
_TRUE_MEASURES = ["true/confidence", "true/ece", "true/error", "true/sem1_bias", "true/sem2_bias"]
"""Measures that need the model's exact probability of its answers, and the true distribution."""
_BRACES = re.compile(r"(?:\\[A-Za-z]+|[\^_])(?:\{[^{}]*\})+|\{([A-Za-z_]\w*)\}")
"""Braces in a prompt. Group 1 is a single word in braces, which counts as a placeholder. Arguments of LaTeX, such as
`\\boxed{x}` and `x_{i}`, and braces round anything else, as in JSON, are text."""


class CalibrateMeasureSpec(RunSpec):
    """Calibration of a language model whose confidence is the agreement among its answers to a question."""

    shares_batches: ClassVar[bool] = False

    kind: Literal["calibrate.measure"]
    model: LanguageModelSpec = Field(description="the model that is measured: a `run` or a `folder`")
    questions: QuestionsSpec = Field(description="the questions, and their correct answers")
    samples: int = Field(50, ge=2, le=10_000, description="answers to each question")
    prompt: str = Field("{question}", description="text that the model continues; {question} stands for the question")
    answer: Literal["whole", "line"] = Field(
        "whole",
        description="which part of a response is the answer: all of it, or the rest of the line of its last `Answer:`",
    )
    clustering: ClustererSpec = Field(ExactMatch(), description="which answers have equal meaning, and are one class")
    decoding: DecodingSpec = Field(DecodingSpec(), description="how the answers are sampled")
    sampler: SamplerSpec = Field(SamplerSpec(), description="the engines that generate them")
    bins: int = Field(10, ge=1, le=1000, description="bins of equal width of the calibration errors")
    bootstrap: int = Field(1000, ge=1, le=100_000, description="draws and resamples behind each interval")

    @model_validator(mode="after")
    def _fits(self) -> CalibrateMeasureSpec:
        if self.model.name is not None:
            raise field_error(
                "model.name", "a new model knows nothing that could be measured; name a `run` or `folder`"
            )
        if "{question}" not in self.prompt:
            raise field_error("prompt", "the question is asked nowhere: write {question} where it belongs")
        unknown = sorted({name for name in _BRACES.findall(self.prompt) if name not in ("", "question")})
        if unknown:
            placeholders = ", ".join(f"{{{name}}}" for name in unknown)
            reason = f"nothing is known to fill in for {placeholders}; the only placeholder is {{question}}"
            raise field_error("prompt", f"{reason}. Braces that are meant as text need a space inside: {{ word }}")
        if not self.decoding.temperature:
            raise field_error(
                "decoding.temperature", "at 0 all answers to a question agree, whatever the model believes"
            )
        if self.workers.count > 1:
            raise field_error("workers.count", "one worker asks all questions; for speed, set sampler.engines")
        return self

    def metrics(self) -> dict[str, MetricSource]:
        """Accuracy, confidence and calibration errors over the questions."""
        is_own_distribution = float(self.decoding.temperature) == float(self.decoding.top_p) == 1
        measures = _MEASURES
        if is_own_distribution and self.questions.known_world is not None:
            measures = _MEASURES + _TRUE_MEASURES
        return row_sources(measures, "test") | {"coverage": MetricSource("test", None)}

    def cost(self) -> list[str]:
        """Answers and tokens, where the number of questions is known before they are read."""
        engines = f"{self.sampler.engines} {self.sampler.backend} engines of {self.sampler.cpus} CPU"
        engines += f" and {self.sampler.gpus} GPU"
        num_questions = self.questions.num_known_questions
        if num_questions is None:
            return [f"{self.samples} answers to each question, of at most {self.decoding.max_tokens} tokens", engines]
        answers = num_questions * self.samples
        return [
            f"{num_questions:,} questions, {answers:,} answers, at most {answers * self.decoding.max_tokens:,} tokens",
            engines,
        ]
