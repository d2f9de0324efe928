"""The result of self-play: the policy before and after, in the exact game."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from poise.kinds.common.trained_result import TrainedResult
from poise.store.result import ResultModel, Score

__all__ = ["AlignSelfplayResult", "PolicyResult"]


class PolicyResult(ResultModel):
    """Means over the questions: exploitability, total variation from the equilibria, and the policy itself.

    The last entry of `policy` is the probability of all texts that the oracle does not list, as is `outside`.
    """

    exploitability: Score
    distance: Score
    outside: Score
    distance_regularised: Score | None = None
    policy: list[Score]


class AlignSelfplayResult(TrainedResult):
    """The game of the questions, and the policy before and after training."""

    kind: Literal["align.selfplay"] = "align.selfplay"
    method: str
    oracle: str
    iterations: int
    num_questions: int
    num_responses: int
    equilibrium: list[float] = Field(description="of the game over the listed answers and all others")
    start: PolicyResult
    final: PolicyResult
