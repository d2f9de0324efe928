"""The input gradient of convolutions with few input channels, two to six times faster on a CPU.

oneDNN works in blocks of eight or sixteen channels. A first layer has fewer input channels, so that in the gradient of
its input most of each block is empty; in its forward pass the blocks are its filters, and full. Here that gradient is
written as operations whose blocks are full. With many filters it is a matrix product whose columns are added up where
they came from (`fold`). With few filters it is a convolution of stride 1: with stride s the pixels fall into s x s
phases, and each phase meets its own taps of the kernel. The phases become channels, which a pixel shuffle interleaves
into the image.
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

_COLUMNS = 2**22  # numbers in one matrix product: 16 MiB in fp32, of which a cache holds a good part

Backward = Callable[[Tensor, torch.Size], Tensor]
"""(gradient of the output (N, F, h, w), shape of the input) -> gradient of the input."""


@contextmanager
def narrow_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, narrow convolutions compute the gradient of their input by `by_phases` or `by_columns`.

    They compute no other gradient: the parameters must be frozen. The gradient is the same up to rounding. Nothing
    changes for forward passes, other layers, channels-last images, compiled models and GPUs.
    `tests/benchmarks/bench_narrow.py` has the shapes that were measured.
    """
    is_compiled = any(hasattr(module, "_orig_mod") for module in model.modules())
    layers = [] if is_compiled else [layer for layer in model.modules() if is_narrow(layer)]
    for layer in layers:
        backward = by_phases(layer) if uses_phases(layer) else by_columns(layer)
        # an attribute of the instance hides the method of the class, and nothing else of the module changes
        vars(layer)["forward"] = partial(_forward, layer, backward, layer.weight.detach().clone())
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def is_narrow(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether oneDNN is the slower way: one input channel, or fewer than eight with a stride above 1.

    False inside `narrow_gradients`, where the layer is replaced already.
    """
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
    kernel = layer.weight.detach().flatten(1).T  # (C * taps, F)
    padding = _padding(layer)

    def backward(upstream: Tensor, shape: torch.Size) -> Tensor:
        flat = upstream.flatten(2)  # (N, F, h * w)
        images = max(_COLUMNS // (len(kernel) * flat.shape[2]), 1)  # per product
        gradients = []
        for part in torch.split(flat, images):
            columns = kernel @ part  # (n, C * taps, h * w)
            gradients.append(
                functional.fold(columns, shape[2:], layer.kernel_size, padding=padding, stride=layer.stride)
            )
        return torch.cat(gradients)

    return backward


def by_phases(layer: nn.Conv2d) -> Backward:
    """The gradient as a convolution of stride 1 whose channels are the phases of the pixels, and a pixel shuffle."""
    stride = layer.stride[0]
    padding = _padding(layer)
    rows, above, below = _taps(layer.kernel_size[0], stride, padding[0])
    columns, left, right = _taps(layer.kernel_size[1], stride, padding[1])
    weight = functional.pad(layer.weight.detach(), (0, 1, 0, 1))  # the tap beyond the last is zero
    split = weight[:, :, rows][..., columns]  # (F, C, s, taps, s, taps)
    kernel = split.permute(1, 2, 4, 0, 3, 5).flatten(0, 2).contiguous()  # (C * s * s, F, taps, taps)

    def backward(upstream: Tensor, shape: torch.Size) -> Tensor:
        height, width = shape[2:]
        # pixels per phase, rounded up; what the outputs do not cover is padded at the end
        end_rows = below + -(-height // stride) - upstream.shape[2]
        end_columns = right + -(-width // stride) - upstream.shape[3]
        padded = functional.pad(upstream, (left, end_columns, above, end_rows))
        phases = functional.conv2d(padded, kernel)  # (N, C * s * s, height / s, width / s)
        return functional.pixel_shuffle(phases, stride)[..., :height, :width]

    return backward


def _taps(size: int, stride: int, padding: int) -> tuple[Tensor, int, int]:
    """For one axis: the tap of the kernel by which phase r meets offset u, (s, offsets), and the padding on both sides.

    Output o meets pixel stride * q + r with the tap stride * (q - o) + r + padding. Taps that do not exist are `size`.
    """
    before = (size - 1 - padding) // stride
    after = (padding + stride - 1) // stride
    offsets = before - torch.arange(before + after + 1)
    taps = stride * offsets + torch.arange(stride).unsqueeze(1) + padding
    return torch.where((taps >= 0) & (taps < size), taps, size), before, after


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(layer.padding, str)
    height, width = layer.padding
    return height, width


def _forward(layer: nn.Conv2d, backward: Backward, weight: Tensor, x: Tensor) -> Tensor:
    """The convolution, with `backward` for its input gradient where that is right.

    `weight`: the numbers that `backward` was made from. A model may replace or change its weight in every forward, so
    they are compared.
    """
    is_supported = (
        x.dtype == torch.float32 == layer.weight.dtype and x.is_contiguous() and not torch.is_autocast_enabled("cpu")
    )
    input_gradient_only = (
        x.requires_grad and torch.is_grad_enabled() and not any(p.requires_grad for p in layer.parameters())
    )
    if not (is_supported and input_gradient_only and torch.equal(layer.weight, weight)):
        return nn.Conv2d.forward(layer, x)
    convolved: Tensor = _Convolution.apply(x, layer, backward)  # type: ignore[no-untyped-call]
    return convolved


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d, backward: Backward) -> Tensor:
        ctx.shape = x.shape
        ctx.backward_of = backward
        return nn.Conv2d.forward(layer, x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_of(upstream[0].contiguous(), ctx.shape), None, None
