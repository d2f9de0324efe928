"""Building the network of a `ModelSpec`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from poise.errors import UserError
from poise.models.architectures import RESIDUAL, VGG, Shape
from poise.models.cnn_vgg import small_cnn, vgg
from poise.models.layers import ACTIVATIONS, Normalize
from poise.models.residual import residual_network
from poise.models.spec import ModelSpec, check_shape

__all__ = ["build", "build_on_meta"]


def build(
    spec: ModelSpec, *, shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float], seed: int
) -> nn.Sequential:
    """The network of `spec` on the CPU, in training mode: x (N, *shape) in [0, 1] to logits (N, classes).

    It has two parts: `normalize` (see `Normalize`), then `body`. The weights are a function of `seed` alone; the
    global random state is not changed.

    Raises:
        UserError: images too small, fewer than 2 classes, `mean` or `std` that do not fit the channels.
    """
    check_shape(shape, classes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        body = _body(spec, shape, classes)
        _initialize(body)
    normalize = _normalize(shape[0], mean, std) if spec.normalize == "data" else nn.Identity()
    network = nn.Sequential(OrderedDict(normalize=normalize, body=body))
    if spec.channels_last and not any(_overruns(module) for module in network.modules()):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def build_on_meta(spec: ModelSpec, *, shape: Shape, classes: int) -> nn.Sequential:
    """The network of `spec` on torch's meta device: it has names, shapes and sizes, and no memory for its weights.

    Raises:
        UserError: images too small, or fewer than 2 classes.
    """
    channels = shape[0]
    with torch.device("meta"):
        return build(spec, shape=shape, classes=classes, mean=(0.0,) * channels, std=(1.0,) * channels, seed=0)


def _body(spec: ModelSpec, shape: Shape, classes: int) -> nn.Sequential:
    width = spec.base_width
    activation = ACTIVATIONS[spec.activation]
    if spec.name in RESIDUAL:
        plan = RESIDUAL[spec.name]
        return residual_network(plan, width=width, channels=shape[0], classes=classes, activation=activation)
    if spec.name in VGG:
        return vgg(VGG[spec.name], width=width, channels=shape[0], classes=classes, activation=activation)
    return small_cnn(width=width, shape=shape, classes=classes, activation=activation)


def _overruns(module: nn.Module) -> bool:
    """Whether oneDNN (AVX2 and AVX-512) would write past the buffer of the weight gradient with channels innermost.

    It does for a strided 1x1 convolution of fewer channels than a vector register holds (uxlfoundation/oneDNN#6035).
    """
    if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1):
        return False
    return module.stride != (1, 1) and module.in_channels < 16


def _initialize(body: nn.Module) -> None:
    """Kaiming-normal weights and zero biases in convolutions; other layers keep torch's defaults."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _normalize(channels: int, mean: Sequence[float], std: Sequence[float]) -> Normalize:
    if not len(mean) == len(std) == channels:
        raise UserError(f"{len(mean)} means and {len(std)} stds do not fit images of {channels} channels")
    if not all(value > 0 for value in std):
        raise UserError(f"every std must be above 0, not {list(std)}: is a channel constant? set model.normalize: none")
    return Normalize(mean, std)
