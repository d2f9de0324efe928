"""How a policy stands in the game that it plays: exact, from the probability of every listed answer.

All other texts count as one more answer: they tie with each other and lose alike, so the game with them taken together
is the game over all texts, and the probability of saying anything else is played, not normalised away.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from poise.align.games import Vector, exploitability, nash_equilibrium, regularised_nash
from poise.align.oracles import extended
from poise.align.spec import NashRs
from poise.errors import UserError
from poise.kinds.language import shared_logprobs
from poise.kinds.selfplay import Asked
from poise.kinds.specs.align import AlignSelfplaySpec
from poise.train.context import Context

__all__ = ["Measured", "Standing"]


@dataclass(frozen=True)
class Measured:
    """Per question: the policy (Q, n + 1), its last column for all that is not listed; exploitability (Q,); total
    variation from the equilibrium of the game (Q,), and from that regularised towards the reference, for Nash-RS."""

    policies: Vector
    exploitability: Vector
    distance: Vector
    regularised: Vector | None

    def summary(self) -> dict[str, float]:
        """Means over the questions."""
        means = {
            "exploitability": self.exploitability.mean(),
            "distance": self.distance.mean(),
            "outside": self.policies[:, -1].mean(),
        }
        if self.regularised is not None:
            means["distance_regularised"] = self.regularised.mean()
        return {name: float(value) for name, value in means.items()}


class Standing:
    """The game of every question, and where the policy stood when this was made."""

    def __init__(
        self, spec: AlignSelfplaySpec, model: nn.Module, asked: Sequence[Asked], stop: Collection[int], context: Context
    ) -> None:
        """`stop`: the tokens that end a response, as for the sampler and the oracle."""
        self.asked, self._model, self._stop, self._context = asked, model, stop, context
        self.game = extended(spec.oracle.rows)
        self.equilibrium = nash_equilibrium(self.game)
        policies = self._policies()
        tau = float(spec.method.tau) if isinstance(spec.method, NashRs) else None
        self._goals = None if tau is None else self._regularised(policies, tau)
        self.start = self._measured(policies)

    def measure(self) -> Measured:
        """The policy as it is now; every rank scores its share of the questions and gets the whole."""
        return self._measured(self._policies())

    def table(self, final: Measured) -> dict[str, Any]:
        """Every question before and after, for artifacts/selfplay.json."""
        return {
            "matrix": self.game[:-1, :-1].tolist(),
            "equilibrium": self.equilibrium.tolist(),
            "questions": [
                {
                    "prompt": question.prompt,
                    "answers": question.answers,
                    "goal": (self.equilibrium if self._goals is None else self._goals[row]).tolist(),
                    **{
                        name: {
                            "policy": measured.policies[row].tolist(),
                            "exploitability": float(measured.exploitability[row]),
                        }
                        for name, measured in (("start", self.start), ("final", final))
                    },
                }
                for row, question in enumerate(self.asked)
            ],
        }

    def _regularised(self, policies: Vector, tau: float) -> Vector:
        """The equilibria of all questions at once."""
        try:
            return regularised_nash(self.game, policies, tau)
        except ValueError as error:
            raise UserError(f"method.tau: {error}") from error

    def _measured(self, policies: Vector) -> Measured:
        def distance(goals: Vector) -> Vector:
            return np.asarray(0.5 * np.abs(policies - goals).sum(1))

        gains = exploitability(self.game, policies)
        regularised = None if self._goals is None else distance(self._goals)
        return Measured(policies, gains, distance(self.equilibrium), regularised)

    def _policies(self) -> Vector:
        prompts, answers = [one.tokens for one in self.asked], [one.answer_tokens for one in self.asked]
        listed = torch.stack(shared_logprobs(self._model, prompts, answers, self._stop, self._context)).double().exp()
        full = torch.cat([listed, (1 - listed.sum(1, keepdim=True)).clamp(min=0)], 1).numpy()
        return np.asarray(full / full.sum(1, keepdims=True))
