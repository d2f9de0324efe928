"""Gradients of narrow convolutions: other operations, the same numbers, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from poise.robust.attacks.base import attack_mode, input_gradient
from poise.robust.attacks.losses import cross_entropy
from poise.robust.attacks.narrow import by_columns, by_phases, is_narrow

OURS, TORCHS = "_ConvolutionBackward", "ConvolutionBackward0"


@st.composite
def convolutions(draw: Any) -> tuple[nn.Conv2d, torch.Tensor]:
    """Any convolution without groups or dilation, padded by up to its kernel, and two images of at least one window."""
    integers = st.integers
    channels, filters, stride = draw(integers(1, 5)), draw(integers(1, 10)), draw(integers(1, 4))
    kernel = draw(integers(1, 7)), draw(integers(1, 7))
    padding = draw(integers(0, kernel[0])), draw(integers(0, kernel[1]))
    size = draw(integers(1, 14)), draw(integers(1, 14))
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    torch.manual_seed(draw(integers(0, 99)))
    return nn.Conv2d(channels, filters, kernel, stride, padding).double(), torch.rand(2, channels, *size).double()


@settings(max_examples=150, deadline=None)
@given(convolutions())
@pytest.mark.parametrize("way", [by_columns, by_phases])
def test_the_gradient_is_that_of_autograd(way, drawn):
    layer, x = drawn
    y = layer(x.requires_grad_())
    upstream = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(way(layer)(upstream, x.shape), expected, rtol=1e-12, atol=1e-12)


def test_columns_of_many_images_are_made_in_parts(monkeypatch):
    monkeypatch.setattr("poise.robust.attacks.narrow._COLUMNS", 9 * 36 * 2 + 1)  # two images of 36 windows of 9 taps
    layer, upstream = nn.Conv2d(1, 4, 3, 1, 1), torch.randn(5, 4, 6, 6)
    whole = by_columns(layer)(upstream, torch.Size((5, 1, 6, 6)))
    alone = [by_columns(layer)(one, torch.Size((1, 1, 6, 6))) for one in upstream.split(1)]
    torch.testing.assert_close(whole, torch.cat(alone))


def network(channels: int, filters: int, stride: int, *, channels_last: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(channels, filters, 3, stride, 1), nn.ReLU(), nn.Conv2d(filters, 8, 3, 1, 1), nn.Flatten(),
        nn.LazyLinear(5),
    )  # fmt: skip
    model = nn.Sequential(*layers)
    model(torch.zeros(1, channels, 12, 12))
    return model.to(memory_format=torch.channels_last) if channels_last else model


def batch(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(6, channels, 12, 12, generator=draw), torch.randint(5, (6,), generator=draw)


def step_of(model: nn.Sequential, x: torch.Tensor, place: int = 0) -> str:
    """What differentiates the output of that layer."""
    with torch.enable_grad():
        return type(model[: place + 1](x.clone().requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize(("channels", "filters", "stride"), [(1, 16, 1), (1, 4, 2), (1, 16, 2), (3, 8, 2), (7, 9, 2)])
def test_the_narrow_layer_alone_is_differentiated_in_another_way(channels, filters, stride):
    model, (x, y) = network(channels, filters, stride), batch(channels)
    plain, *told = input_gradient(model, x, y, cross_entropy)
    with attack_mode(model):
        assert [step_of(model, x, place) for place in (0, 2)] == [OURS, TORCHS]
        gradient, *same = input_gradient(model, x, y, cross_entropy)
        with attack_mode(model):
            assert step_of(model, x) == OURS
        assert step_of(model, x) == OURS
    assert step_of(model, x) == TORCHS
    torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(one, other) for one, other in zip(told, same, strict=True))


@pytest.mark.parametrize(("channels", "stride", "last"), [(3, 1, False), (8, 2, False), (3, 2, True)])
def test_other_layers_and_channels_last_images_are_left_to_torch(channels, stride, last):
    model, (x, _) = network(channels, 8, stride, channels_last=last), batch(channels)
    x = x.to(memory_format=torch.channels_last) if last else x
    with attack_mode(model):
        assert step_of(model, x) == TORCHS


def test_other_types_of_numbers_are_left_to_torch():
    model, (x, _) = network(1, 8, 2), batch(1)
    with attack_mode(model):
        with torch.autocast("cpu", torch.bfloat16):
            assert step_of(model, x) == TORCHS
        assert step_of(model.double(), x.double()) == TORCHS


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3, 2, groups=2),
        nn.Conv2d(1, 4, 3, dilation=2),
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(1, 4, 3, padding="same"),
        nn.Conv2d(2, 4, 3, (2, 3)),
        type("Own", (nn.Conv2d,), {})(1, 4, 3),
        nn.Conv2d(1, 4, 3).double(),
        nn.Conv2d(1, 4, 3, device="meta"),
    ],
)
def test_convolutions_of_other_kinds_are_not_narrow(layer):
    assert not is_narrow(layer)


@pytest.mark.parametrize("how", ["swapped", "changed", "changed unseen", "normed"])
def test_weights_that_are_not_those_of_the_beginning_are_left_to_torch(how):
    """As a randomised defence has them, or a norm that is worked out anew in every forward."""
    model, (x, y) = network(1, 8, 2), batch(1)
    if how == "normed":
        model[0] = nn.utils.spectral_norm(model[0]).eval()
    with attack_mode(model):
        weights = {"0.weight": -model[0].weight} if how == "swapped" else {}
        if how.startswith("changed"):
            (model[0].weight if how == "changed" else model[0].weight.data).mul_(2)
        gradient, _, _ = input_gradient(lambda images: functional_call(model, weights, images), x, y, cross_entropy)
    if weights:
        model[0].weight = nn.Parameter(weights["0.weight"])
    torch.testing.assert_close(gradient, input_gradient(model.eval(), x, y, cross_entropy)[0])


def test_an_error_on_the_way_leaves_the_layers_as_they_were():
    model, (x, y) = network(1, 8, 1), batch(1)

    def failing(gradient: torch.Tensor) -> None:
        raise RuntimeError("on the way")

    point = x.requires_grad_()
    point.register_hook(failing)
    with pytest.raises(RuntimeError, match="on the way"), attack_mode(model):
        torch.autograd.grad(cross_entropy(model(point), y).sum(), point)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_whose_forward_somebody_has_replaced_keeps_it():
    model, (x, _) = network(1, 8, 1), batch(1)
    model[0].forward = lambda images: images.repeat(1, 8, 1, 1)
    with attack_mode(model):
        assert torch.equal(model[0](x), x.repeat(1, 8, 1, 1))
    assert torch.equal(model[0](x), x.repeat(1, 8, 1, 1))
