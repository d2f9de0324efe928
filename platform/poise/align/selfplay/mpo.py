"""Magnetic preference optimization (MPO, arXiv 2410.16714)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from poise.align.selfplay.base import KLTerm, SelfPlayMethod, check_preference
from poise.spec import ExactNumber

__all__ = ["Mpo"]

_Positive = Annotated[ExactNumber, Field(gt=0)]


class Mpo(SelfPlayMethod):
    """Magnetic preference optimization: self-play with a KL term to a magnet, which periodically becomes the policy.

    The magnet is the reference. Within a period the policy approaches the equilibrium regularised towards the magnet;
    over the periods, that of the game itself.
    """

    name: Literal["mpo"] = "mpo"
    inner_steps: int = Field(
        2, ge=2, le=1000, description="optimizer steps per iteration; in the first of them eta has no effect"
    )
    alpha: _Positive = Field(ExactNumber("0.3"), description="coefficient of KL(policy || magnet)")
    eta: _Positive = Field(
        ExactNumber(1), description="step size: 1 / eta is the coefficient of KL(policy || previous policy)"
    )
    period: int = Field(
        ge=2, description="iterations after which the magnet becomes the policy; below about 10 it may diverge"
    )
    opponents: int = Field(8, ge=1, le=4096, description="responses of the current policy to compare each rollout with")

    @property
    def num_opponents(self) -> int:
        """The option `opponents`; against opponents of the magnet the method would cycle."""
        return self.opponents

    def advantage(self, preference: Tensor) -> Tensor:
        """Mean preference over the opponents minus that of the other rollouts: (P, G) from (P, G, K), G >= 2.

        The baseline leaves one out (Ahmadian et al., 2024), so that it adds no bias.
        """
        check_preference(preference)
        reward = preference.mean(-1)  # (P, G)
        others = preference.shape[1] - 1
        baseline = (reward.sum(1, keepdim=True) - reward) / others
        return reward - baseline

    def regularizers(self) -> Mapping[str, KLTerm]:
        """KL to the magnet and to the previous policy."""
        return {
            "magnet": KLTerm("reference", float(self.alpha)),
            "previous": KLTerm("previous", 1 / float(self.eta)),
        }

    def replaces_reference(self, iteration: int) -> bool:
        """The magnet becomes the policy after every `period` iterations."""
        return iteration > 0 and iteration % self.period == 0
