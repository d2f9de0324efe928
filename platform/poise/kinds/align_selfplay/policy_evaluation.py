"""Exact evaluation of a policy in the game that it plays, from the probability of every listed answer.

All other texts count as one more answer. They tie with each other and lose alike, so the game in which they are one
answer is equivalent to the game over all texts, and the probability of anything else is part of the policy instead of
being normalised away.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from poise.align.games import Vector, exploitability, nash_equilibrium, regularised_nash
from poise.align.oracles import with_other_answer
from poise.errors import UserError
from poise.kinds.align_selfplay.questions import GameQuestion
from poise.kinds.align_selfplay.spec import AlignSelfplaySpec
from poise.kinds.common.language_evaluation import shared_logprobs
from poise.train.context import Context

__all__ = ["PolicyEvaluator", "PolicyMetrics"]


@dataclass(frozen=True)
class PolicyMetrics:
    """The policy on Q questions with n listed answers each.

    Attributes:
        policies: (Q, n + 1); the last column is the probability of all texts that are not listed.
        exploitability: (Q,).
        distance: total variation from the equilibrium of the game, (Q,).
        regularised: total variation from the equilibrium regularised towards the reference, (Q,), where the method
            aims at that one.
    """

    policies: Vector
    exploitability: Vector
    distance: Vector
    regularised: Vector | None

    def summary(self) -> dict[str, float]:
        """Means over the questions, by metric name."""
        means = {
            "exploitability": self.exploitability.mean(),
            "distance": self.distance.mean(),
            "outside": self.policies[:, -1].mean(),
        }
        if self.regularised is not None:
            means["distance_regularised"] = self.regularised.mean()
        return {name: float(value) for name, value in means.items()}


class PolicyEvaluator:
    """Evaluates a model in the game of every question; `start` is its evaluation when the evaluator was made."""

    def __init__(
        self,
        spec: AlignSelfplaySpec,
        model: nn.Module,
        questions: Sequence[GameQuestion],
        stop: Collection[int],
        context: Context,
    ) -> None:
        """`stop`: the tokens that end a response, the same as for the sampler and the oracle."""
        self.questions = questions
        self._model = model
        self._stop = stop
        self._context = context
        self.game = with_other_answer(spec.oracle.rows)  # (n + 1, n + 1)
        self.equilibrium = nash_equilibrium(self.game)  # (n + 1,)
        policies = self._policies()
        self._regularised_equilibria: Vector | None = None  # (Q, n + 1)
        tau = spec.method.equilibrium_tau
        if tau is not None:  # the reference of the regularised game is the policy at the start
            self._regularised_equilibria = self._solve_regularised(policies, tau)
        self.start = self._metrics(policies)

    def measure(self) -> PolicyMetrics:
        """Evaluate the model as it is now. Every rank scores its share of the questions and gets all metrics."""
        return self._metrics(self._policies())

    def table(self, final: PolicyMetrics) -> dict[str, Any]:
        """Every question before and after training, for artifacts/selfplay.json."""
        rows = [self._table_row(index, question, final) for index, question in enumerate(self.questions)]
        return {
            "matrix": self.game[:-1, :-1].tolist(),
            "equilibrium": self.equilibrium.tolist(),
            "questions": rows,
        }

    def _table_row(self, index: int, question: GameQuestion, final: PolicyMetrics) -> dict[str, Any]:
        equilibria = self._regularised_equilibria
        goal = self.equilibrium if equilibria is None else equilibria[index]
        row: dict[str, Any] = {"prompt": question.prompt, "answers": question.answers, "goal": goal.tolist()}
        for name, metrics in (("start", self.start), ("final", final)):
            row[name] = {
                "policy": metrics.policies[index].tolist(),
                "exploitability": float(metrics.exploitability[index]),
            }
        return row

    def _solve_regularised(self, policies: Vector, tau: float) -> Vector:
        """The equilibria regularised towards `policies` with strength `tau`, for all questions: (Q, n + 1).

        Raises:
            UserError: they cannot be computed for such a small `tau`.
        """
        try:
            return regularised_nash(self.game, policies, tau)
        except ValueError as error:
            raise UserError(f"method: {error}") from error

    def _metrics(self, policies: Vector) -> PolicyMetrics:
        def total_variation(equilibria: Vector) -> Vector:
            return np.asarray(0.5 * np.abs(policies - equilibria).sum(1))

        gains = exploitability(self.game, policies)
        regularised = None
        if self._regularised_equilibria is not None:
            regularised = total_variation(self._regularised_equilibria)
        return PolicyMetrics(policies, gains, total_variation(self.equilibrium), regularised)

    def _policies(self) -> Vector:
        """The probability of every listed answer and of everything else, of all questions: (Q, n + 1)."""
        prompts = [question.tokens for question in self.questions]
        answers = [question.answer_tokens for question in self.questions]
        logprobs = shared_logprobs(self._model, prompts, answers, self._stop, self._context)
        listed = torch.stack(logprobs).double().exp()  # (Q, n)
        other = (1 - listed.sum(1, keepdim=True)).clamp(min=0)  # (Q, 1); below 0 by rounding only
        policies = torch.cat([listed, other], 1).numpy()
        return np.asarray(policies / policies.sum(1, keepdims=True))
