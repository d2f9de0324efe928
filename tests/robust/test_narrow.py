"""Gradients of narrow convolutions: another kernel, the same numbers, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from poise.robust.attacks.contract import attack_mode, input_gradient
from poise.robust.attacks.losses import cross_entropy

OWN = "aten::_slow_conv2d_backward"


def network(channels: int, stride: int, *, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(channels, 8, 3, stride, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten(), nn.LazyLinear(5))
    model = nn.Sequential(*layers)
    model(torch.zeros(1, channels, 12, 12))
    return model.to(memory_format=torch.channels_last) if channels_last else model


def batch(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(6, channels, 12, 12, generator=draw), torch.randint(5, (6,), generator=draw)


def kernels(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        gradient, _, _ = input_gradient(model, x, y, cross_entropy)
    return gradient, [event.name for event in seen.events()]


@pytest.mark.parametrize(("channels", "stride"), [(1, 1), (1, 2), (3, 2), (7, 2)])
def test_the_narrow_layer_alone_is_differentiated_by_the_other_kernel(channels, stride):
    model, (x, y) = network(channels, stride), batch(channels)
    plain, before = kernels(model, x, y)
    with attack_mode(model):
        gradient, inside = kernels(model, x, y)
    assert before.count(OWN) == 0
    assert inside.count(OWN) == 1
    torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-7)
    assert kernels(model, x, y)[1].count(OWN) == 0
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize(("channels", "stride", "last"), [(3, 1, False), (8, 2, False), (1, 1, True), (3, 2, True)])
def test_other_layers_and_channels_last_images_are_left_to_onednn(channels, stride, last):
    model, (x, y) = network(channels, stride, channels_last=last), batch(channels)
    if last:
        x = x.to(memory_format=torch.channels_last)
    with attack_mode(model):
        assert kernels(model, x, y)[1].count(OWN) == 0


def test_an_error_on_the_way_leaves_onednn_as_it_was():
    model, (x, y) = network(1, 1), batch(1)

    def failing(gradient: torch.Tensor) -> None:
        raise RuntimeError("on the way")

    point = x.requires_grad_()
    point.register_hook(failing)
    with pytest.raises(RuntimeError, match="on the way"), attack_mode(model):
        torch.autograd.grad(cross_entropy(model(point), y).sum(), point)
    assert torch.backends.mkldnn.enabled
    assert not any(module._forward_hooks for module in model.modules())
