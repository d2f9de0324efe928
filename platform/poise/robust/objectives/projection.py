"""RAMP's gradient projection: adds the part of natural training that agrees with adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.robust.objectives.base import State

__all__ = ["GradientProjection", "fused"]

_OLD = "old/"
_NATURAL = "natural/"


@dataclass(frozen=True)
class GradientProjection:
    """Joins the weights of natural (even) and adversarial (odd) epochs; call it after every optimizer step.

    Both epochs of a pair start from the same weights theta_old. At the end of a natural epoch the model goes back to
    theta_old. At the end of an adversarial one it goes to `fused` of the weights of the two epochs, and so do its
    running statistics (RAMP, Jiang and Singh, 2024). The optimizer's momentum runs
    on through both.
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
        finished_epochs, step_in_epoch = divmod(step, self.steps_per_epoch)
        if step_in_epoch > 0:
            return state
        current = self.model.state_dict()
        if finished_epochs % 2 == 1:  # a natural epoch ends
            state = state | self._copy(_NATURAL)
            self._load({name: state[_OLD + name] for name in current})
            return state
        joint = {}
        for name, adversarial in current.items():
            joint[name] = fused(state[_OLD + name], state[_NATURAL + name], adversarial, self.beta)
        self._load(joint)
        return state | self._copy(_OLD)

    def _copy(self, prefix: str) -> State:
        return {prefix + name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _load(self, values: State) -> None:
        current = self.model.state_dict()  # its tensors share memory with the model
        for name, value in values.items():
            current[name].copy_(value)


def fused(old: Tensor, natural: Tensor, adversarial: Tensor, beta: float) -> Tensor:
    """old + (1 - beta) d_a + beta max(cos(d_a, d_n), 0) d_n, for one tensor of the model.

    d_a = adversarial - old and d_n = natural - old. Counters (integers) are those of the adversarial epoch.
    """
    if not adversarial.is_floating_point():
        return adversarial
    d_a = adversarial - old
    d_n = natural - old
    cosine = nn.functional.cosine_similarity(d_a.flatten().double(), d_n.flatten().double(), dim=0)
    return old + (1 - beta) * d_a + beta * cosine.clamp(min=0).to(old.dtype) * d_n
