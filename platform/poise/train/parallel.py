"""Data parallelism by the context: gradients averaged by DDP, batch-norm statistics averaged after each step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from poise.train.context import Context

__all__ = ["average_statistics", "batch_statistics", "distribute"]


def distribute(model: nn.Module, context: Context) -> nn.Module:
    """The model as the loop calls it: itself on one rank, wrapped in DDP on several.

    DDP's own buffer broadcast is off: it writes into buffers between the forward passes of one step, and gives every
    rank the statistics of rank 0's share of the data; `average_statistics` uses all of it. On a CPU the buckets stay in
    their first order, so that a resumed run adds gradients in the order in which an uninterrupted one does.
    """
    if context.world_size == 1:
        return model
    ids = [context.device] if context.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, forward_sync_buffers=False, find_unused_parameters=ids is None and context.world_size > 2
    )


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of every batch-norm layer."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [t for layer in layers for t in (layer.running_mean, layer.running_var) if t is not None]


@torch.no_grad()
def average_statistics(statistics: list[Tensor], world_size: int) -> None:
    """Replace each tensor by its mean over all ranks, in one all-reduce."""
    if world_size == 1 or not statistics:
        return
    flat = torch.cat([tensor.flatten() for tensor in statistics])
    dist.all_reduce(flat)
    parts = torch.split(flat / world_size, [tensor.numel() for tensor in statistics])
    for tensor, part in zip(statistics, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
