"""Nash learning by rejection sampling (Nash-RS, arXiv 2503.10990 v1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from poise.align.selfplay.base import KLTerm, SelfPlayMethod, check_preference
from poise.spec import ExactNumber

__all__ = ["NashRs"]


class NashRs(SelfPlayMethod):
    """Nash learning by rejection sampling: against those responses of the reference that the policy does not beat.

    It approaches the equilibrium of the game that is regularised towards the reference with strength `tau`. The reward
    is scaled such that one tau is both the temperature of rejection and the coefficient of the KL term.
    """

    name: Literal["nash_rs"] = "nash_rs"
    tau: Annotated[ExactNumber, Field(gt=0)] = Field(
        ExactNumber("0.2"), description="temperature of rejection, and coefficient of KL(policy || reference)"
    )
    proposals: int = Field(64, ge=2, le=4096, description="responses of the reference per question, drawn once")

    @property
    def num_proposals(self) -> int:
        """The option `proposals`."""
        return self.proposals

    def advantage(self, preference: Tensor) -> Tensor:
        """Mean preference over the accepted proposals minus a baseline: (P, G) from (P, G, K), G >= 2.

        Rejection accepts proposal k with probability exp(-g_k / tau), where g_k is the mean preference for the policy's
        responses over it. Here every proposal gets that probability as its weight, normalised. This costs no more, and
        never leaves a question without a proposal. (The public code of the paper inverts the acceptance.) For each
        rollout, weights and baseline come from the other G - 1 rollouts.
        """
        check_preference(preference)
        tau = float(self.tau)
        others = preference.shape[1] - 1
        mean_of_others = (preference.sum(1, keepdim=True) - preference) / others  # (P, G, K): g_k without rollout g
        weights = (-mean_of_others / tau).softmax(-1)
        rewards = torch.einsum("pgk,phk->pgh", weights, preference)  # of rollout h under the weights of rollout g
        reward = rewards.diagonal(dim1=1, dim2=2)  # (P, G): of rollout g under its own weights
        baseline = (rewards.sum(2) - reward) / others
        return reward - baseline

    def regularizers(self) -> Mapping[str, KLTerm]:
        """KL to the reference, with the coefficient tau that the weights of the proposals have as temperature."""
        return {"reference": KLTerm("reference", float(self.tau))}

    @property
    def equilibrium_tau(self) -> float:
        """The option `tau`."""
        return float(self.tau)
