"""GEM, which preserves diversity (Li et al., arXiv 2408.16673).

An opponent q = softmax(z / beta), held fixed, weighs the tokens that the model prefers to the label y:

    L = sum_k q_k w_k (z_k - z_y)        dL/dz_k = q_k w_k - 1[k = y] sum_j q_j w_j

with w = 1 (`linear`) or w_k = sigmoid(0.01 (z_k - z_y)), also fixed (`logsigmoid`). Linear GEM has the gradient of
beta * CE(z / beta): its optimum is p_data^beta, renormalised. The value is not a likelihood: log the cross entropy too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from poise.finetune.losses.base import IGNORE_INDEX, FinetuneLoss, at_least_fp32, num_tokens, supervised
from poise.spec import ExactNumber

__all__ = ["Gem", "Variant", "fused_linear_gem", "gem_loss"]

Variant = Literal["linear", "logsigmoid"]

SLOPE = 0.01
"""The factor of z_k - z_y in the sigmoid of the variant `logsigmoid`."""


class Gem(FinetuneLoss):
    """GEM: imitation that keeps the entropy of the answers (arXiv 2408.16673)."""

    name: Literal["gem"] = Field("gem", description="game against softmax(logits / beta), held fixed")
    beta: Annotated[ExactNumber, Field(gt=0, le=10)] = Field(
        ExactNumber("0.7"), description="temperature of the opponent; 1 is cross entropy, less keeps more entropy"
    )
    variant: Variant = Field(
        "linear", description="weight of other preferred tokens; logsigmoid has half the gradient of linear"
    )

    def loss(self, logits: Tensor, labels: Tensor, *, normalizer: float | None = None) -> Tensor:
        """See `gem_loss`."""
        return gem_loss(logits, labels, float(self.beta), self.variant, normalizer=normalizer)

    def describe(self) -> str:
        """The variant and beta, such as "gem (linear, beta 0.7)"."""
        return f"gem ({self.variant}, beta {self.beta})"


def gem_loss(
    logits: Tensor, labels: Tensor, beta: float = 0.7, variant: Variant = "linear", *, normalizer: float | None = None
) -> Tensor:
    """The GEM loss (see the module). ValueError for beta <= 0 or an unknown variant."""
    _check(beta, variant)
    z, y = supervised(logits, labels)
    margins = z - z.gather(1, y[:, None])  # (N, V), z_k - z_y
    weights = _weights(z.detach(), margins.detach(), beta, variant)  # constants for the gradient
    return (weights * margins).sum() / num_tokens(y, normalizer)


def fused_linear_gem(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    beta: float = 0.7,
    variant: Variant = "linear",
    *,
    normalizer: float | None = None,
    rows: int = 2048,
) -> Tensor:
    """`gem_loss(hidden @ head.T, ...)`, with the logits of at most `rows` tokens in memory at a time.

    hidden (..., d), head (V, d). The gradients are computed during the forward pass, chunk by chunk; that of `head` is
    summed in at least fp32.
    """
    _check(beta, variant)
    is_supervised = labels != IGNORE_INDEX
    h = hidden[is_supervised]  # (N, d)
    y = labels[is_supervised]  # (N,)
    total: Tensor = _FusedLinearGem.apply(h, head, y, beta, variant, rows)  # type: ignore[no-untyped-call]
    return total / num_tokens(y, normalizer)


class _FusedLinearGem(torch.autograd.Function):
    """The sum of the GEM losses of N tokens: h (N, d), head (V, d), y (N,)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Tensor, y: Tensor, beta: float, variant: Variant, rows: int) -> Tensor:
        total = torch.zeros((), dtype=at_least_fp32(head), device=h.device)
        grad_h = torch.empty_like(h)
        grad_head = torch.zeros_like(head, dtype=at_least_fp32(head)) if ctx.needs_input_grad[1] else None
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            z = (h[part] @ head.T).to(at_least_fp32(head))  # (rows, V)
            margins = z - z.gather(1, y[part, None])
            weights = _weights(z, margins, beta, variant)
            total += (weights * margins).sum()
            # dL/dz_k = weight_k - 1[k = y] sum_j weight_j
            grad = weights.scatter_add(1, y[part, None], -weights.sum(1, keepdim=True))
            grad_h[part] = grad.to(head.dtype) @ head
            if grad_head is not None:
                grad_head += grad.T @ h[part].to(grad.dtype)
        ctx.save_for_backward(grad_h, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_head = ctx.saved_tensors
        scaled_h = (scale * grad_h).to(grad_h.dtype)
        scaled_head = None if grad_head is None else scale * grad_head
        return scaled_h, scaled_head, None, None, None, None


def _weights(z: Tensor, margins: Tensor, beta: float, variant: Variant) -> Tensor:
    """q_k w_k of each token (N, V)."""
    q = (z / beta).softmax(-1)
    if variant == "linear":
        return q
    return q * (SLOPE * margins).sigmoid()


def _check(beta: float, variant: str) -> None:
    if not beta > 0:
        raise ValueError(f"beta is a temperature above 0, not {beta}")
    if variant not in ("linear", "logsigmoid"):
        raise ValueError(f"a variant of GEM is linear or logsigmoid, not {variant!r}")
