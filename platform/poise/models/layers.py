"""Layers that several architectures share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation", "Normalize", "conv3x3", "pooled_linear"]

Activation = Callable[[], nn.Module]

# Softplus with beta 1, as in the softplus PreAct-ResNet-18 of the E-AT and RAMP networks.
ACTIVATIONS: dict[str, Activation] = {"relu": nn.ReLU, "silu": nn.SiLU, "softplus": nn.Softplus}


class Normalize(nn.Module):
    """`(x - mean) / std` per channel, for x (N, C, H, W) in [0, 1].

    Normalization is a layer of the model, so that attacks and threats are in pixel units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def conv3x3(inside: int, outside: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps the sides of the image; stride 2 halves them, rounding up."""
    return nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=bias)


def pooled_linear(channels: int, classes: int) -> nn.Sequential:
    """Mean over the pixels, then one linear layer: (N, C, H, W) to (N, classes)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
