"""Random crops and flips of a whole batch at once."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Draws", "PadMode", "crop_and_flip", "draw"]

PadMode = Literal["reflect", "zero"]


class Draws(NamedTuple):
    """Where each crop begins in its padded image, and which are mirrored: (N,) int64, int64, bool."""

    top: Tensor
    left: Tensor
    flip: Tensor


def draw(n: int, *, pad: int, flip: bool, seed: int) -> Draws:
    """Uniform draws for n images, a function of the arguments alone; made on the CPU, so the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    mirrored = torch.randint(2, (n,), generator=generator) == 1
    return Draws(top, left, mirrored & flip)


def crop_and_flip(images: Tensor, draws: Draws, *, pad: int, mode: PadMode) -> Tensor:
    """Pad each side of images (N, C, H, W) by `pad` below H and W, crop back to (H, W) as drawn, then mirror.

    One gather on the device of `images`, of any dtype. Reflection does not repeat the border.
    """
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + (draws.top - pad)[:, None]
    cols = torch.arange(width, device=images.device) + (draws.left - pad)[:, None]
    cols = torch.where(draws.flip[:, None], cols.flip(1), cols)
    source = _reflected(rows, height)[:, :, None] * width + _reflected(cols, width)[:, None, :]  # (N, H, W)
    flat = source.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    cropped = images.flatten(2).gather(2, flat).view(images.shape)
    if mode == "reflect":
        return cropped
    outside = _outside(rows, height)[:, :, None] | _outside(cols, width)[:, None, :]
    return cropped.masked_fill_(outside[:, None], 0)


def _reflected(index: Tensor, side: int) -> Tensor:
    last = side - 1
    return last - (last - index.abs()).abs()


def _outside(index: Tensor, side: int) -> Tensor:
    return (index < 0) | (index >= side)
