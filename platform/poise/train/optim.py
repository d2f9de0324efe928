"""Optimizers by name."""

from __future__ import annotations

import torch
from torch import nn

from poise.errors import UserError
from poise.train.spec import Optimizer, Sgd

__all__ = ["build_optimizer"]


def build_optimizer(spec: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters of a model; UserError when there are none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError("the model has no trainable parameter")
    if isinstance(spec, Sgd):
        return torch.optim.SGD(
            parameters,
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(
        parameters,
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=True,
    )
