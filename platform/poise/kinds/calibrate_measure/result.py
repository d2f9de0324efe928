"""The result of measuring calibration: errors with intervals, and the data of the figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from poise.store.result import ResultModel, RunResult

__all__ = ["AnswerCounts", "CalibrateMeasureResult", "ListedQuestion"]


class AnswerCounts(ResultModel):
    """Samples that were drawn; those that are blank, have no answer or were truncated; questions with a tie."""

    drawn: int
    empty: int
    no_answer: int
    truncated: int
    tied_questions: int


class ListedQuestion(ResultModel):
    """A question for the page: its most frequent answers with their counts, and the number K of classes."""

    question: str
    answers: list[tuple[str, int]]
    K: int
    sem1: float
    sem2: float
    gap: float
    correct: bool


class CalibrateMeasureResult(RunResult):
    """Measures as `[value, low, high]`, None where undefined. A prefix names the estimate of confidence."""

    kind: Literal["calibrate.measure"] = "calibrate.measure"
    num_examples: int = Field(description="questions that were asked")
    tokens: int = Field(description="tokens that were drawn")
    protocol: str = Field(description="all settings that the numbers depend on, as text")
    coverage: float = Field(description="share of the questions with an answer")
    answers: AnswerCounts
    metrics: dict[str, tuple[float | None, float | None, float | None]]
    noise_floor: dict[str, float | None] = Field(description="ECE of a calibrated model with these confidences")
    reliability: dict[str, dict[str, list[float]]] = Field(description="count, confidence and accuracy of each bin")
    histogram: dict[str, list[int]] = Field(description="questions in cells of equal width of the confidence")
    hardest: list[ListedQuestion]
    confidently_wrong: list[ListedQuestion]

    def num_examples_of(self, split: str) -> int | None:
        """The number of questions; their rows have the split `test`."""
        return None if split == "train" else self.num_examples

    def facts(self) -> Iterator[tuple[str, str]]:
        """How many questions there were."""
        yield "questions", f"{self.num_examples:,}"
