"""The losses that attacks maximise: from logits (N, K) and labels (N,) to a loss per example (N,), at least float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "LOSSES",
    "Loss",
    "cross_entropy",
    "cw_loss",
    "divergence",
    "dlr",
    "kl_from",
    "log_odds",
    "targeted_dlr",
    "targeted_margin",
    "without_underflow",
]

Loss = Callable[[Tensor, Tensor], Tensor]


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they already are, whatever the model computes in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log p_y."""
    return functional.cross_entropy(wide(logits), y, reduction="none")


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """log((1 - p_y) / p_y) = logsumexp_{k != y} z_k - z_y.

    It increases with the cross entropy, so both have the same gradient direction and order points in the same way. The
    gradient of the cross entropy vanishes where p_y rounds to one: in float32 its part of z_y from a margin of 17 on,
    all of it from 104 on. The gradient of the log odds does not vanish.
    """
    z = wide(logits)
    others = z.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.logsumexp(1) - _logit_of(z, y)


def without_underflow(loss: Loss) -> Loss:
    """The loss that an attack maximises in place of `loss`: `log_odds` for the cross entropy, any other loss itself."""
    return log_odds if loss is cross_entropy else loss


def cw_loss(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y: positive exactly where the model is wrong."""
    z = wide(logits)
    return _best_other(z, y) - _logit_of(z, y)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y for targets (N,)."""
    z = wide(logits)
    return _logit_of(z, target) - _logit_of(z, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)); unchanged by shift and scale.

    Croce and Hein, 2020. Raises ValueError for fewer than three classes, where it has no denominator.
    """
    z = wide(logits)
    if z.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the model has {z.shape[1]}: use the margin or CE")
    top = _without_masked(z).topk(3, dim=1).values  # (N, 3)
    spread = (top[:, 0] - top[:, 2]).clamp(min=1e-12)
    return (_best_other(z, y) - _logit_of(z, y)) / spread


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) for targets (N,). Raises ValueError for fewer than four classes."""
    z = wide(logits)
    if z.shape[1] < 4:
        raise ValueError(f"the targeted DLR loss needs at least 4 classes, the model has {z.shape[1]}: use the margin")
    top = _without_masked(z).topk(4, dim=1).values  # (N, 4)
    spread = (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp(min=1e-12)
    return (_logit_of(z, target) - _logit_of(z, y)) / spread


def kl_from(reference: Tensor) -> Loss:
    """KL(p || q) of the reference's p, from logits (N, K) at the clean images, and q at the attacked ones (TRADES).

    Its gradient is exactly zero at the clean image itself: start elsewhere. Where p rounds to one in a class, the
    divergence is -log q of that class, whose gradient underflows as well: there its `log_odds` takes its place.
    """
    reference = reference.detach()
    confidence, predicted = wide(reference).softmax(1).max(1)
    certain = confidence == 1

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return torch.where(certain, log_odds(logits, predicted), divergence(reference, logits))

    return loss


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) per example, p and q being the softmax of logits (N, K).

    Both enter as logarithms: with p itself, its gradient is NaN where p underflows to zero.
    """
    log_p = functional.log_softmax(wide(reference), dim=1)  # (N, K)
    log_q = functional.log_softmax(wide(logits), dim=1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "cw": cw_loss, "dlr": dlr}


def _logit_of(z: Tensor, labels: Tensor) -> Tensor:
    """The logit of the label of each example, (N,)."""
    return z.gather(1, labels.unsqueeze(1)).squeeze(1)


def _without_masked(z: Tensor) -> Tensor:
    """Logits with -inf, which stands for a masked class, replaced by the lowest finite logit of the row."""
    masked = z == -torch.inf
    lowest = z.detach().masked_fill(masked, torch.inf).amin(1, keepdim=True)
    return torch.where(masked, lowest, z)


def _best_other(z: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} z_k, (N,)."""
    return z.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
