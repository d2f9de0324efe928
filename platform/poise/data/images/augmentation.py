"""Random crops and flips of a whole batch at once."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Draws", "PadMode", "crop_and_flip", "draw"]

PadMode = Literal["reflect", "zero"]


class Draws(NamedTuple):
    """Random crops and flips of N images: first row and column of each crop in its padded image, and whether to mirror.

    top, left: (N,) int64. flip: (N,) bool.
    """

    top: Tensor
    left: Tensor
    flip: Tensor


def draw(n: int, *, pad: int, flip: bool, seed: int) -> Draws:
    """Uniform draws for n images, a pure function of the arguments.

    The numbers are drawn on the CPU, so they are the same for every device.
    """
    generator = torch.Generator().manual_seed(seed)
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    mirrored = torch.randint(2, (n,), generator=generator) == 1  # drawn without `flip` too
    return Draws(top, left, mirrored & flip)


def crop_and_flip(images: Tensor, draws: Draws, *, pad: int, mode: PadMode) -> Tensor:
    """Pad each side of images (N, C, H, W) by `pad`, crop back to (H, W) at the drawn positions, then mirror.

    `pad` must be less than H and W. Works for any dtype, as one gather on the device of `images`. Reflection does not
    repeat the border.
    """
    height, width = images.shape[2:]
    # source coordinates of every target pixel; negative or too large ones lie in the padding
    rows = torch.arange(height, device=images.device) + (draws.top - pad)[:, None]  # (N, H)
    cols = torch.arange(width, device=images.device) + (draws.left - pad)[:, None]  # (N, W)
    # to mirror a crop is to read its columns from right to left
    cols = torch.where(draws.flip[:, None], cols.flip(1), cols)
    source_rows = _reflect(rows, height)[:, :, None]  # (N, H, 1)
    source_cols = _reflect(cols, width)[:, None, :]  # (N, 1, W)
    source = source_rows * width + source_cols  # (N, H, W), indices of flattened pixels
    flat = source.flatten(1)[:, None].expand(-1, images.shape[1], -1)  # (N, C, H * W)
    cropped = images.flatten(2).gather(2, flat).view(images.shape)
    if mode == "reflect":
        return cropped
    # padding by zeros: the same gather, then every pixel that came from outside the image becomes 0
    outside = _is_outside(rows, height)[:, :, None] | _is_outside(cols, width)[:, None, :]  # (N, H, W)
    return cropped.masked_fill_(outside[:, None], 0)


def _reflect(index: Tensor, side: int) -> Tensor:
    """Coordinates mirrored at 0 and at side - 1, so that all lie inside."""
    last = side - 1
    # |i| mirrors at 0; last - |last - i| mirrors at last
    return last - (last - index.abs()).abs()


def _is_outside(index: Tensor, side: int) -> Tensor:
    return (index < 0) | (index >= side)
