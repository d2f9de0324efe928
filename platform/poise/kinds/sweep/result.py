"""The result of a sweep: the outcome of every trial, and the best of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from poise.store.result import ResultModel, RunResult

__all__ = ["SweepResult", "TrialResult"]


class TrialResult(ResultModel):
    """The outcome of a trial.

    Attributes:
        metric: the best value that it reached, at `step`.
        test: its test metrics by name.
        num_examples: the number of examples that `metric` is a mean over, where it is known.
        num_tested: the same for the metrics of `test`.
    """

    run: str
    status: str
    values: dict[str, Any] = Field(description="by dotted path, the value that was set there, as it was written")
    metric: float | None
    step: int | None
    test: dict[str, float]
    error: str | None = None
    num_examples: int | None = None
    num_tested: int | None = None


class SweepResult(RunResult):
    """All trials in their order; `parts` are their runs."""

    kind: Literal["sweep"] = "sweep"
    metric: str
    mode: Literal["max", "min"]
    judgement: dict[str, Any] = Field(description="settings by which trials were compared and stopped")
    judged_by: str = Field(description="what trials were compared by, as text")
    judged_on: str = Field(description="split of the metric")
    best: str = Field(description="run of the best trial")
    failed: list[str] = Field(description="runs of the trials that have failed")
    trials: list[TrialResult]
