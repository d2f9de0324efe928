"""The base class of self-play methods: opponents, advantage, KL regularizers, loss, and replacement of the reference.

Each iteration draws G rollouts per question from the policy and compares them with K other responses. The preferences
give an advantage, and `inner_steps` optimizer steps learn from it. Two other policies are at hand: `previous`, from
which the rollouts of the iteration were drawn, and `reference`, the initial policy until the method replaces it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from poise.align.selfplay.policy_loss import KLRegularizer, PolicyLoss, Responses, selfplay_loss
from poise.spec.registry import MethodSection
from poise.user_code import MethodOutputError, explain_method

__all__ = ["KLTerm", "PolicyBatch", "SelfPlayMethod", "check_preference"]


class KLTerm(NamedTuple):
    """The term coefficient * KL(policy || anchor) of a loss, in nats per response."""

    anchor: Literal["reference", "previous"]
    coefficient: float


@dataclass(frozen=True)
class PolicyBatch:
    """The responses of P questions in one optimizer step.

    Attributes:
        responses: N = P * G responses with their prompts; the G rollouts of a question follow each other.
        advantage: what `SelfPlayMethod.advantage` returned, (P, G).
        logits: of the policy in training at the M response tokens, with gradient, (M, V).
        previous: likewise of the policy that the responses were drawn from, without gradient, (M, V).
        reference: likewise of the reference, without gradient, (M, V).
    """

    responses: Responses
    advantage: Tensor
    logits: Tensor
    previous: Tensor
    reference: Tensor


class SelfPlayMethod(MethodSection, ABC):
    """Base of the methods: a section `method` of a spec, whose fields are the options of the method.

    A method has to define `advantage`; everything else has a default. A rollout is compared with
    `num_opponents` and `num_proposals` other responses; if both are 0, with all rollouts of its question, itself
    included (K = G; the preference to itself is 1/2).
    """

    inner_steps: int = Field(1, ge=1, le=1000, description="optimizer steps per iteration")

    @property
    def num_opponents(self) -> int:
        """How many further responses of the current policy are drawn per question and iteration, as opponents only."""
        return 0

    @property
    def num_proposals(self) -> int:
        """How many responses of the initial policy are drawn per question before the first iteration, as opponents."""
        return 0

    @property
    def training_metrics(self) -> Sequence[str]:
        """The names of further metrics that `loss` reports, by which a sweep may choose. By default none."""
        return ()

    @abstractmethod
    def advantage(self, preference: Tensor) -> Tensor:
        """The advantage of each rollout: (P, G) from (P, G, K).

        preference[p, g, k] = P(rollout g is preferred to response k), opponents before proposals. It is computed once
        per iteration. A method with a `loss` of its own may return more per question, such as (P, G, G) for pairs.
        """

    def regularizers(self) -> Mapping[str, KLTerm]:
        """The KL terms of the loss, by their names in metrics (`kl/<name>`); none by default."""
        return {}

    def loss(self, batch: PolicyBatch) -> PolicyLoss:
        """The loss of each response: by default the policy gradient of the advantage and the KL terms.

        Raises:
            UserError: `regularizers` returned something else than KL terms to the reference or the previous policy.
        """
        anchor_logits = {"reference": batch.reference, "previous": batch.previous}
        anchors = {}
        with explain_method(self, "regularizers"):
            for name, term in self.regularizers().items():
                if not isinstance(term, KLTerm) or term.anchor not in anchor_logits:
                    expected = "it must be a KLTerm with the anchor 'reference' or 'previous'"
                    raise MethodOutputError(f"{self.name}.regularizers: {name!r} is {term!r}: {expected}")
                anchors[name] = KLRegularizer(term.coefficient, anchor_logits[term.anchor])
        return selfplay_loss(batch.logits, batch.previous, anchors, batch.responses, batch.advantage.flatten())

    def replaces_reference(self, iteration: int) -> bool:
        """Whether the policy becomes the reference at the start of an iteration, counted from 0; by default never."""
        return False

    @property
    def equilibrium_tau(self) -> float | None:
        """The strength tau of the regularised game whose equilibrium the method aims at, see `games.regularised_nash`.

        None, the default: the policy is compared with the equilibrium of the game itself only.
        """
        return None


def check_preference(preference: Tensor) -> None:
    """Raise ValueError unless preferences are (P, G, K) with K >= 1, and G >= 2: a baseline needs other rollouts."""
    if preference.ndim != 3 or preference.shape[1] < 2 or not preference.shape[2]:
        raise ValueError(f"needs preferences (P, G, K) with G >= 2 and K >= 1, not {tuple(preference.shape)}")
