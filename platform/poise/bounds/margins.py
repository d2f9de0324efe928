"""Margins of a classifier, and the largest norm of its inputs with and without an adversary."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from poise.robust.threats import Threat

__all__ = ["Margins", "Radius", "clean_margins", "data_radius", "margin_percentile", "on_grid"]

Margins = Literal["correct", "all"]
Radius = Literal["paper", "l2", "box"]
_ORDERS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


def clean_margins(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of the label minus the largest other logit: logits (N, K), labels (N,) to float64 (N,)."""
    logits = logits.double()
    label_logit = logits.gather(1, y.unsqueeze(1)).squeeze(1)  # (N,)
    largest_other = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return label_logit - largest_other


def margin_percentile(margins: Tensor, percent: float, of: Margins = "correct") -> float:
    """A percentile of margins (N,), linearly interpolated; NaN where it is not above 0, where no bound is defined.

    `of`: "all" takes all examples, as in the papers' experiments (NaN as soon as more than `percent` of them are
    misclassified), "correct" only those that are classified correctly. A bound holds at any margin that does not depend
    on the data, see `on_grid`. It limits the risk minus the share of examples whose margin is smaller.
    """
    values = margins[margins > 0] if of == "correct" else margins
    if not len(values):
        return math.nan
    value = float(np.percentile(values.cpu().numpy(), percent))
    return value if value > 0 else math.nan


def on_grid(margin: float) -> tuple[float, float]:
    """The largest power of 2 that is at most `margin`, and its share of the failure probability delta.

    A margin that is chosen after training needs a union over all margins that could have been chosen. The k-th power of
    2, counted from 1 outwards, has the share 1 / (k (k + 1)), and all shares sum to 1.
    """
    exponent = math.floor(math.log2(margin))
    k = 2 * exponent if exponent > 0 else 1 - 2 * exponent
    return 2.0**exponent, 1 / (k * (k + 1))


def data_radius(x: Tensor, threat: Threat, radius: Radius = "box", *, shift: Tensor | float = 0.0) -> float:
    """The largest 2-norm of x' - shift, over images x (N, ...) in [0, 1] and all x' that `threat` allows.

    `paper`: max{1, D^(1/2 - 1/p)} (max ||x - shift||_p + eps), as printed. `l2`: max ||x - shift||_2 + max{1, ...} eps.
    `box`: per image, the smaller of `l2` and the distance to the farthest corner of [x - eps, x + eps] in [0, 1]. Each
    is an upper bound, and each is at most the one before; with eps 0 the last two are exact.
    """
    shift = torch.as_tensor(shift, dtype=torch.float64, device=x.device)
    flat = (x.double() - shift).flatten(1)  # (N, D)
    order = _ORDERS[threat.norm]
    stretch: float = max(1.0, flat.shape[1] ** (0.5 - 1 / order))  # of the 2-norm over the norm of the threat
    if radius == "paper":
        return stretch * (float(torch.linalg.vector_norm(flat, ord=order, dim=1).max()) + threat.eps)
    lengths = torch.linalg.vector_norm(flat, dim=1) + stretch * threat.eps  # (N,)
    if radius == "box":
        image = x.double()
        downwards = (image - threat.eps).clamp(0, 1) - image  # the largest steps of each pixel within the box
        upwards = (image + threat.eps).clamp(0, 1) - image
        farthest = torch.maximum((flat + downwards.flatten(1)).abs(), (flat + upwards.flatten(1)).abs())
        lengths = torch.minimum(lengths, torch.linalg.vector_norm(farthest, dim=1))
    return float(lengths.max())
