"""Gradients of images with few channels, two to seven times faster on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["is_narrow", "narrow_gradients"]


@contextmanager
def narrow_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, PyTorch's own kernel finds the gradient of the input of narrow convolutions, as first layers often are.

    Narrow is one channel, or with strides fewer than eight: of the blocks of eight or sixteen channels in which oneDNN
    works these leave most empty. Forwards, all other layers, channels-last images, compiled models and GPUs are as
    before. The gradient is the same up to rounding. `tests/benchmarks/bench_narrow.py` has the shapes that were tried.
    """
    before = bool(torch.backends.mkldnn.enabled)
    is_compiled = any(hasattr(module, "_orig_mod") for module in model.modules())
    layers = [] if is_compiled else filter(is_narrow, model.modules())
    handles = [layer.register_forward_hook(_differentiate_without_onednn) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _use_onednn(before)


def is_narrow(layer: nn.Module) -> bool:
    """Whether oneDNN is the slower one for the gradient of this layer's input, in the plain layout on a CPU."""
    if not isinstance(layer, nn.Conv2d):
        return False
    return layer.in_channels == 1 or (max(layer.stride) > 1 and layer.in_channels < 8)


def _differentiate_without_onednn(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    step = output.grad_fn
    if step is None or output.device.type != "cpu" or output.dtype != torch.float32 or not output.is_contiguous():
        return
    before = bool(torch.backends.mkldnn.enabled)
    step.register_prehook(lambda gradients: _use_onednn(False))
    step.register_hook(lambda *gradients: _use_onednn(before))


def _use_onednn(enabled: bool) -> None:
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]  # a property of the module
