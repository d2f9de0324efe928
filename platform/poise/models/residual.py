"""Residual networks for small images: ResNet-18, PreAct-ResNet-18 and wide ResNets."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from poise.models.architectures import ResidualPlan
from poise.models.layers import Activation, conv3x3, pooled_linear

__all__ = ["residual_network"]


class PostActBlock(nn.Module):
    """Two convolutions, each normalised, and an activation after the sum (He et al. 2015)."""

    def __init__(self, inside: int, outside: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.conv1 = conv3x3(inside, outside, stride)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = conv3x3(outside, outside)
        self.bn2 = nn.BatchNorm2d(outside)
        self.activation = activation()
        self.shortcut = nn.Sequential()  # the identity where the shape does not change
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(_conv1x1(inside, outside, stride), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        result: Tensor = self.activation(out)
        return result


class PreActBlock(nn.Module):
    """Two convolutions, each after a normalisation and an activation (He et al. 2016).

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input, as in PreAct-ResNet-18 and in
    the wide ResNets.
    """

    def __init__(self, inside: int, outside: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = conv3x3(inside, outside, stride)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = conv3x3(outside, outside)
        self.activation = activation()
        self.shortcut = _conv1x1(inside, outside, stride) if stride != 1 or inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.bn1(x))
        out: Tensor = self.conv2(self.activation(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def residual_network(
    plan: ResidualPlan, *, width: int, channels: int, classes: int, activation: Activation
) -> nn.Sequential:
    """The network of `plan` with a 3x3 stem: (N, channels, H, W) to logits (N, classes)."""
    last = plan.stages[-1] * width
    stem: list[nn.Module] = [conv3x3(channels, width)]
    final: list[nn.Module] = []
    # blocks that activate first leave the sum of the last one to be normalised; the others need an activated stem
    if plan.preactivated:
        final = [nn.BatchNorm2d(last), activation()]
    else:
        stem += [nn.BatchNorm2d(width), activation()]
    return nn.Sequential(*stem, *_blocks(plan, width, activation), *final, pooled_linear(last, classes))


def _blocks(plan: ResidualPlan, width: int, activation: Activation) -> Iterator[nn.Module]:
    """The blocks of all stages in order; the first block of every stage but the first has stride 2."""
    block = PreActBlock if plan.preactivated else PostActBlock
    inside = width
    for stage, factor in enumerate(plan.stages):
        outside = factor * width
        for index in range(plan.blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            yield block(inside, outside, stride, activation)
            inside = outside


def _conv1x1(inside: int, outside: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 1, stride=stride, bias=False)
