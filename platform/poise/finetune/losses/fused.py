"""Losses of a linear head without the logits of a batch: a few hundred tokens at a time.

One row of logits in fp32 takes 4 V bytes, 0.6 MB at a vocabulary V of 152,000: the logits of 16,000 tokens and their
gradient are 20 GB. Here the head, the loss and both gradients are computed for `rows` tokens, in the forward pass; the
logits are discarded, and the backward pass only scales the gradients. The results are those of the whole batch up to
the rounding of sums. It works for every loss that is a sum over tokens (`FinetuneLoss.per_token`), also of the user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from poise.finetune.losses.base import IGNORE_INDEX, at_least_fp32

__all__ = ["LinearHead", "TokenLoss", "fused_loss"]

TokenLoss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""A loss with a gradient and scalar metrics, of logits (N, V) and labels (N,)."""

VALUES_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}
"""The largest number of logits at a time, by the type of the device: 16 and 256 MiB in fp32. A loss holds a few copies.
A GPU needs more rows for its matrix products than a CPU does."""


@dataclass(frozen=True)
class LinearHead:
    """The head of a language model: logits = softcap tanh(scale (hidden weight^T + bias) / softcap).

    Attributes:
        weight: (V, d), the parameter itself, so that it gets its gradient.
        bias: (V,), or None.
        scale: a factor on the logits.
        softcap: bound of the logits (Gemma 2); None without.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (..., V) of hidden states (..., d)."""
        return self.finish(nn.functional.linear(hidden, self.weight, self.bias))

    def finish(self, products: Tensor) -> Tensor:
        """Scale and softcap of hidden weight^T + bias."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def fused_loss(
    token_loss: TokenLoss, hidden: Tensor, labels: Tensor, head: LinearHead, *, rows: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`token_loss(head.logits(hidden), labels)`, for at most `rows` supervised tokens at a time.

    Args:
        token_loss: a loss and metrics that are sums over tokens, so that those of parts add up to those of the whole.
        hidden: (..., d), the input of the head.
        labels: (...), aligned with the position that predicts them; IGNORE_INDEX where a token is not supervised.
        head: its weight and bias get gradients where they require them.
        rows: by default so many that there are `VALUES_AT_ONCE` logits.
    """
    is_supervised = labels != IGNORE_INDEX
    h = hidden[is_supervised]  # (N, d)
    y = labels[is_supervised]  # (N,)
    if not len(y):
        return token_loss(head.logits(h), y)
    sums: dict[str, Tensor] = {}

    def of_chunk(logits: Tensor, chunk_labels: Tensor) -> Tensor:
        value, metrics = token_loss(logits, chunk_labels)
        for name, metric in metrics.items():
            sums[name] = sums[name] + metric if name in sums else metric
        return value

    if rows is None:
        rows = max(1, VALUES_AT_ONCE.get(hidden.device.type, VALUES_AT_ONCE["cuda"]) // len(head.weight))
    value: Tensor = _Fused.apply(h, head.weight, head.bias, y, head, of_chunk, rows)  # type: ignore[no-untyped-call]
    return value, sums


class _Fused(torch.autograd.Function):
    """The sum of `of_chunk(logits, labels)` over chunks of h (N, d) and y (N,): a scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        head: LinearHead,
        of_chunk: Callable[[Tensor, Tensor], Tensor],
        rows: int,
    ) -> Tensor:
        wide = at_least_fp32(weight)
        needs_h, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=wide, device=h.device)
        grad_h = torch.empty_like(h) if needs_h else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        dtype = _matmul_dtype(weight)
        w = weight.to(dtype)  # once, not in every matrix product
        b = None if bias is None else bias.to(dtype)
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            chunk = h[part].to(dtype)  # (rows, d)
            products = nn.functional.linear(chunk, w, b).detach().requires_grad_()  # (rows, V)
            with torch.enable_grad():
                value = of_chunk(head.finish(products), y[part])
            (grad,) = torch.autograd.grad(value, products)  # (rows, V)
            total += value.detach()
            if grad_h is not None:
                grad_h[part] = (grad @ w).to(grad_h.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, chunk)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_h, grad_weight, grad_bias)
        ctx.dtypes = (h.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since the gradient of the weight is large. A second backward pass is an error of autograd.
        scaled = [
            None if grad is None else grad.mul_(scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in place, without a temporary tensor of its size where the dtypes are equal."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer of this weight computes: that of autocast, where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
