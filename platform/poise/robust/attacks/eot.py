"""Expectation over transformation: attacks on randomised models, such as those with noise or random crops."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from poise.robust.attacks.losses import wide

__all__ = ["AveragedModel"]


class AveragedModel(nn.Module):
    """The mean prediction of a randomised classifier over several draws, for any attack and for the final accuracy.

    Maps images (N, ...) to log(mean over draws of softmax(logits)), (N, K) in float32 or better. An attack on it
    maximises the loss of the mean prediction and follows the gradient through all draws (Athalye et al., 2018, section
    5.1). An example is correct if the mean prediction is. It costs `draws` forwards and backwards, and their memory.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        """Raises ValueError for fewer than one draw."""
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws is at least 1, not {draws}")
        self.model = model
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        log_probabilities = [wide(self.model(x.clone())).log_softmax(1) for _ in range(self.draws)]
        stacked = torch.stack(log_probabilities)  # (draws, N, K)
        mean: Tensor = stacked.logsumexp(0) - math.log(self.draws)
        return mean
