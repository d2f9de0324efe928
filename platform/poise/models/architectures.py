"""The architectures as tables, from which modules are built."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["RESIDUAL", "SMALLEST_SIDE", "VGG", "WIDTH", "Architecture", "ResidualPlan", "Shape"]

Architecture = Literal[
    "cnn", "preact_resnet18", "resnet18", "wrn_28_10", "wrn_34_10", "vgg11", "vgg13", "vgg16", "vgg19"
]
Shape = tuple[int, int, int]  # channels, height, width of one image

SMALLEST_SIDE = 4  # two halvings must leave a pixel


class ResidualPlan(NamedTuple):
    """The stages of a residual network; every stage but the first halves the sides of the image."""

    stages: tuple[int, ...]  # channels of each stage, as multiples of the width
    blocks: int  # residual blocks in each stage
    preactivated: bool


WIDTH: dict[str, int] = {
    "cnn": 32,
    "preact_resnet18": 64,
    "resnet18": 64,
    "wrn_28_10": 16,
    "wrn_34_10": 16,
    "vgg11": 64,
    "vgg13": 64,
    "vgg16": 64,
    "vgg19": 64,
}

RESIDUAL: dict[str, ResidualPlan] = {
    "resnet18": ResidualPlan((1, 2, 4, 8), blocks=2, preactivated=False),
    "preact_resnet18": ResidualPlan((1, 2, 4, 8), blocks=2, preactivated=True),
    "wrn_28_10": ResidualPlan((10, 20, 40), blocks=4, preactivated=True),
    "wrn_34_10": ResidualPlan((10, 20, 40), blocks=5, preactivated=True),
}

# One tuple per stage, one entry per convolution: its channels as a multiple of the width. A max-pool ends each stage.
VGG: dict[str, tuple[tuple[int, ...], ...]] = {
    "vgg11": ((1,), (2,), (4, 4), (8, 8), (8, 8)),
    "vgg13": ((1, 1), (2, 2), (4, 4), (8, 8), (8, 8)),
    "vgg16": ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)),
    "vgg19": ((1, 1), (2, 2), (4, 4, 4, 4), (8, 8, 8, 8), (8, 8, 8, 8)),
}
