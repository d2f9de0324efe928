"""A loss that is computed a part of the tokens at a time, beside the one of all logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from poise.finetune.losses import IGNORE_INDEX, LOSSES, LinearHead, cross_entropy, fused_loss
from poise.finetune.losses.base import compute_loss

V, D = 9, 5


def problem(dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (3, 4, D), labels (3, 4) with two that are ignored, weight (V, D), bias (V,)."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 4, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (3, 4), generator=generator)
    labels[0, 1] = labels[2, 3] = IGNORE_INDEX
    return hidden, labels, weight, bias


def loss_of(name: str, normalizer: float = 7.0):
    loss = LOSSES[name]().prepare([problem()[0].flatten(0, 1).detach()])

    def token_loss(logits: Tensor, labels: Tensor):
        value, metrics = compute_loss(loss, logits, labels, normalizer)
        return value, metrics | {"ce": cross_entropy(logits, labels, normalizer=normalizer).detach()}

    return token_loss


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("rows", [1, 3, None])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": 0.25, "softcap": 2.0}])
def test_it_is_the_eager_loss_in_value_in_metrics_and_in_all_gradients(name, rows, options):
    hidden, labels, weight, bias = problem()
    head = LinearHead(weight, bias, **options)
    value, metrics = loss_of(name)(head.logits(hidden), labels)
    fused, fused_metrics = fused_loss(loss_of(name), hidden, labels, head, rows=rows)
    torch.testing.assert_close(fused, value, rtol=0, atol=1e-14)
    torch.testing.assert_close(fused_metrics, metrics, rtol=0, atol=1e-14)
    wanted = torch.autograd.grad(3 * value, (hidden, weight, bias))
    torch.testing.assert_close(torch.autograd.grad(3 * fused, (hidden, weight, bias)), wanted, rtol=0, atol=1e-14)


def test_a_head_is_scaled_then_capped():
    hidden, _, weight, _ = problem()
    products = hidden @ weight.T
    assert torch.equal(LinearHead(weight, scale=0.5).logits(hidden), 0.5 * products)
    assert torch.equal(LinearHead(weight, scale=0.5, softcap=2.0).logits(hidden), 2 * torch.tanh(0.25 * products))


def test_what_is_frozen_gets_no_gradient():
    hidden, labels, weight, _ = problem()
    fused, _ = fused_loss(loss_of("ce"), hidden, labels, LinearHead(weight.detach()))
    fused.backward()
    assert weight.grad is None
    assert hidden.grad[labels != IGNORE_INDEX].any(-1).all()
    assert not hidden.grad[labels == IGNORE_INDEX].any()
    fused, _ = fused_loss(loss_of("ce"), hidden.detach(), labels, LinearHead(weight))
    fused.backward()
    assert weight.grad.any()


def test_without_a_supervised_token_it_is_a_zero_with_a_gradient():
    hidden, labels, weight, _ = problem()
    value, metrics = fused_loss(loss_of("gem"), hidden, torch.full_like(labels, IGNORE_INDEX), LinearHead(weight))
    assert value == metrics["ce"] == 0
    assert not torch.autograd.grad(value, hidden)[0].any()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_under_autocast_it_is_as_near_to_fp32_as_the_eager_loss(name):
    hidden, labels, weight, _ = problem(torch.float32)
    head = LinearHead(weight)
    exact = torch.autograd.grad(loss_of(name)(head.logits(hidden), labels)[0], (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = torch.autograd.grad(loss_of(name)(head.logits(hidden), labels)[0], (hidden, weight))
        value, _ = fused_loss(loss_of(name), hidden, labels, head, rows=4)
    fused = torch.autograd.grad(value, (hidden, weight))
    for one, other, truth in zip(fused, eager, exact, strict=True):
        assert one.dtype == truth.dtype
        assert (one - truth).norm() <= 2 * (other - truth).norm() + 1e-6


class Sizes(TorchFunctionMode):
    """Remembers the size of the largest tensor that a function of torch returns while it is active."""

    largest = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        tensors = [each for each in (out if isinstance(out, tuple | list) else [out]) if isinstance(each, Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        return out


def test_the_logits_of_the_whole_batch_are_never_there():
    """Of 300 tokens and 500 words, no tensor is larger than 16 tokens of logits."""
    hidden = torch.randn(300, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=True)
    labels = torch.randint(500, (300,))
    with Sizes() as sizes:
        value, _ = fused_loss(loss_of("gem"), hidden, labels, LinearHead(weight), rows=16)
        value.backward()
    assert sizes.largest == 16 * 500
    with Sizes() as sizes:
        loss_of("gem")(hidden @ weight.T, labels)
    assert sizes.largest == 300 * 500


def test_equal_chunks_give_equal_bits():
    hidden, labels, weight, _ = problem(torch.float32)
    one, other = (
        torch.autograd.grad(fused_loss(loss_of("tofu"), hidden, labels, LinearHead(weight), rows=4)[0], weight)
        for _ in range(2)
    )
    assert torch.equal(one[0], other[0])


def test_a_loss_in_a_part_is_called_with_the_normalizer_of_the_whole():
    hidden, labels, weight, _ = problem()
    seen = []

    def token_loss(normalizer, logits, labels):
        seen.append(len(labels))
        return cross_entropy(logits, labels, normalizer=normalizer), {}

    fused_loss(partial(token_loss, 3.0), hidden, labels, LinearHead(weight), rows=4)
    assert seen == [4, 4, 2]
