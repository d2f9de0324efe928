"""The gradient of images with few channels, two to six times faster on a CPU.

oneDNN works in blocks of eight or sixteen channels. Of the few that a first layer has these leave most empty, in the
gradient of its input alone: forwards the blocks are its filters. Here that gradient is written as operations whose
blocks are full. Over many filters it is a matrix product whose columns are added up where they came from (`fold`).
Over few it is a convolution of stride 1: with stride s the pixels fall into s x s phases, every phase sees its own taps
of the kernel, and the phases are so many channels, which a pixel shuffle weaves into the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["by_columns", "by_phases", "is_narrow", "narrow_gradients", "uses_phases"]

_COLUMNS = 2**22  # numbers at once: 16 MiB in fp32, of which a cache holds a good part

Backward = Callable[[Tensor, torch.Size], Tensor]
"""(gradient of the output (N, F, h, w), shape of the input) -> gradient of the input."""


@contextmanager
def narrow_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, narrow convolutions give their input, and nothing else, its gradient by `by_phases` or `by_columns`.

    The parameters are frozen. Forwards, all other layers, channels-last images, compiled models and GPUs are as before;
    the gradient is the same up to rounding. `tests/benchmarks/bench_narrow.py` has the shapes that were tried.
    """
    is_compiled = any(hasattr(module, "_orig_mod") for module in model.modules())
    layers = [] if is_compiled else [layer for layer in model.modules() if is_narrow(layer)]
    for layer in layers:
        backward = (by_phases if uses_phases(layer) else by_columns)(layer)
        vars(layer)["forward"] = partial(_forward, layer, backward, layer.weight.detach().clone())
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def is_narrow(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """One channel, or with strides fewer than eight: where oneDNN is the slower one. False in `narrow_gradients`."""
    return (
        type(layer) is nn.Conv2d
        and "forward" not in vars(layer)
        and (layer.in_channels == 1 or (layer.stride[0] > 1 and layer.in_channels < 8))
        and layer.stride[0] == layer.stride[1]
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
    )


def uses_phases(layer: nn.Conv2d) -> bool:
    """Whether a narrow layer has so few filters that `by_phases` is the faster way."""
    return layer.stride[0] > 1 and layer.out_channels <= max(8, 4 * layer.in_channels)


def by_columns(layer: nn.Conv2d) -> Backward:
    """The gradient as a product with the kernel, a column for each window, and the sum of overlapping columns."""
    kernel, padding = layer.weight.detach().flatten(1).T, _padding(layer)  # (C * taps, F)

    def backward(upstream: Tensor, shape: torch.Size) -> Tensor:
        flat = upstream.flatten(2)
        images = max(_COLUMNS // (len(kernel) * flat.shape[2]), 1)
        parts = [
            functional.fold(kernel @ part, shape[2:], layer.kernel_size, padding=padding, stride=layer.stride)
            for part in torch.split(flat, images)
        ]
        return torch.cat(parts)

    return backward


def by_phases(layer: nn.Conv2d) -> Backward:
    """The gradient as a convolution of stride 1 whose channels are the phases of the pixels, and a pixel shuffle."""
    stride = layer.stride[0]
    (rows, above, below), (columns, left, right) = (
        _taps(size, stride, padding) for size, padding in zip(layer.kernel_size, _padding(layer), strict=True)
    )
    weight = functional.pad(layer.weight.detach(), (0, 1, 0, 1))  # the tap beyond the last is zero
    split = weight[:, :, rows][..., columns]  # (F, C, s, taps, s, taps)
    kernel = split.permute(1, 2, 4, 0, 3, 5).flatten(0, 2).contiguous()  # (C * s * s, F, taps, taps)

    def backward(upstream: Tensor, shape: torch.Size) -> Tensor:
        height, width = shape[2:]
        lower = below + -(-height // stride) - upstream.shape[2]
        outer = right + -(-width // stride) - upstream.shape[3]
        woven = functional.conv2d(functional.pad(upstream, (left, outer, above, lower)), kernel)
        return functional.pixel_shuffle(woven, stride)[..., :height, :width]

    return backward


def _taps(size: int, stride: int, padding: int) -> tuple[Tensor, int, int]:
    """(which tap of the kernel meets pixel phase r at offset u: (s, offsets), padding before, padding after).

    Output o meets pixel stride * q + r with the tap stride * (q - o) + r + padding. Taps that do not exist are `size`.
    """
    before, after = (size - 1 - padding) // stride, (padding + stride - 1) // stride
    offsets = before - torch.arange(before + after + 1)
    taps = stride * offsets + torch.arange(stride).unsqueeze(1) + padding
    return torch.where((taps >= 0) & (taps < size), taps, size), before, after


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(layer.padding, str)
    height, width = layer.padding
    return height, width


def _forward(layer: nn.Conv2d, backward: Backward, weight: Tensor, x: Tensor) -> Tensor:
    """`weight`: the numbers that `backward` was made of; a model may swap or change its own in every forward."""
    plain = (
        x.dtype == torch.float32 == layer.weight.dtype and x.is_contiguous() and not torch.is_autocast_enabled("cpu")
    )
    asked = x.requires_grad and torch.is_grad_enabled() and not any(p.requires_grad for p in layer.parameters())
    if not (plain and asked and torch.equal(layer.weight, weight)):
        return nn.Conv2d.forward(layer, x)
    convolved: Tensor = _Convolution.apply(x, layer, backward)  # type: ignore[no-untyped-call]
    return convolved


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d, backward: Backward) -> Tensor:
        ctx.shape, ctx.backward_of = x.shape, backward
        return nn.Conv2d.forward(layer, x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_of(upstream[0].contiguous(), ctx.shape), None, None
