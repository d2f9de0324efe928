"""Networks without shortcuts: the small CNN and the VGG family."""

from __future__ import annotations

from torch import nn

from poise.models.architectures import Shape
from poise.models.layers import Activation, conv3x3, pooled_linear

__all__ = ["small_cnn", "vgg"]


def small_cnn(*, width: int, shape: Shape, classes: int, activation: Activation) -> nn.Sequential:
    """Two 4x4 convolutions of stride 2 and two linear layers: (N, *shape) to logits (N, classes).

    Without batch normalisation, so that training and evaluation compute the same function.
    """
    channels, rows, columns = shape
    features = 2 * width * (rows // 4) * (columns // 4)
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, stride=2, padding=1),
        activation(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(features, 4 * width),
        activation(),
        nn.Linear(4 * width, classes),
    )


def vgg(
    stages: tuple[tuple[int, ...], ...], *, width: int, channels: int, classes: int, activation: Activation
) -> nn.Sequential:
    """VGG with batch normalisation and one linear layer: (N, channels, H, W) to logits (N, classes).

    Each stage ends in a 2x2 max-pool that rounds up, so that images smaller than 32x32 keep at least one pixel.
    """
    layers: list[nn.Module] = []
    for stage in stages:
        for factor in stage:
            outputs = factor * width
            layers += [conv3x3(channels, outputs, bias=True), nn.BatchNorm2d(outputs), activation()]
            channels = outputs
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, pooled_linear(channels, classes))
