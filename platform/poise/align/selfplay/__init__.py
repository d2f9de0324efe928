"""The methods of self-play, by name. One method is one file here and one line in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from poise.align.selfplay.base import KLTerm, PolicyBatch, SelfPlayMethod
from poise.align.selfplay.mpo import Mpo
from poise.align.selfplay.nash_rs import NashRs
from poise.align.selfplay.policy_loss import PolicyLoss, token_logprobs
from poise.spec.registry import union_of

__all__ = [
    "METHODS",
    "KLTerm",
    "MethodSpec",
    "Mpo",
    "NashRs",
    "PolicyBatch",
    "PolicyLoss",
    "SelfPlayMethod",
    "token_logprobs",
]

METHODS: Mapping[str, type[SelfPlayMethod]] = {
    "mpo": Mpo,
    "nash_rs": NashRs,
}
"""The class of each method, by name. `METHODS["nash_rs"](tau=0.5)` is a method with its options."""

if TYPE_CHECKING:
    MethodSpec = SelfPlayMethod
else:
    MethodSpec = union_of(METHODS, SelfPlayMethod, "poise.selfplay")
    """The section `method` of a spec: one of `METHODS`, or code of the user or of an installed package."""
