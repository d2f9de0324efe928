"""RAMP's gradient projection: what natural training found is added where it agrees with adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.robust.objectives.play import State

__all__ = ["GradientProjection", "fused"]

_OLD, _NATURAL = "old/", "natural/"


@dataclass(frozen=True)
class GradientProjection:
    """To be called behind every optimizer step, when epochs alternate: even ones natural, odd ones adversarial.

    Both start from the same weights theta_old: at the end of a natural epoch the model goes back to them, at the end of
    an adversarial one it goes to `fused` of what the two have found, and so do its running statistics (RAMP, Jiang and
    Singh, 2024; papers/adversarial.md, section 3). The optimizer's momentum runs on through both.
    """

    model: nn.Module
    beta: float
    steps_per_epoch: int

    def initial(self) -> State:
        """The state before the first step: theta_old, and a place for the natural weights. Two copies of the model."""
        return self._copy(_OLD) | self._copy(_NATURAL)

    @torch.no_grad()
    def __call__(self, state: State, step: int) -> State:
        """The state after the optimizer's `step`-th step; writes into the model at the end of an epoch."""
        epoch, left = divmod(step, self.steps_per_epoch)
        if left:
            return state
        if epoch % 2 == 1:
            state = state | self._copy(_NATURAL)
            self._load({name: state[_OLD + name] for name in self.model.state_dict()})
            return state
        own = self.model.state_dict()
        self._load({name: fused(state[_OLD + name], state[_NATURAL + name], own[name], self.beta) for name in own})
        return state | self._copy(_OLD)

    def _copy(self, prefix: str) -> State:
        return {prefix + name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _load(self, values: State) -> None:
        own = self.model.state_dict()
        for name, value in values.items():
            own[name].copy_(value)


def fused(old: Tensor, natural: Tensor, adversarial: Tensor, beta: float) -> Tensor:
    """old + (1 - beta) d_a + beta max(cos(d_a, d_n), 0) d_n, d_a and d_n being what each has moved from `old`.

    Counters (integers) are those of the adversarial epoch.
    """
    if not adversarial.is_floating_point():
        return adversarial
    towards, aside = adversarial - old, natural - old
    cosine = nn.functional.cosine_similarity(towards.flatten().double(), aside.flatten().double(), dim=0)
    return old + (1 - beta) * towards + beta * cosine.clamp(min=0).to(old.dtype) * aside
