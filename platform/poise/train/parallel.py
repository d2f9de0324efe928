"""Data parallelism: gradients are averaged by DDP, batch-norm statistics after each step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from poise.train.context import Context

__all__ = ["average_statistics", "batch_statistics", "distribute"]


def distribute(model: nn.Module, context: Context) -> nn.Module:
    """The model that the loop calls: itself on one rank, wrapped in DDP on several.

    DDP's buffer broadcast is off: it would write into buffers between the forward passes of one step, and give every
    rank the statistics of rank 0's share of the data. `average_statistics` uses the data of all ranks.

    `find_unused_parameters` keeps DDP from reordering its gradient buckets after the first step. A resumed run then
    adds the gradients of more than two ranks in the same order as an uninterrupted one, which makes CPU runs exact.
    """
    if context.world_size == 1:
        return model
    device_ids = [context.device] if context.device.type == "cuda" else None
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        forward_sync_buffers=False,
        find_unused_parameters=device_ids is None and context.world_size > 2,
    )


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of every batch-norm layer."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tensors = [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var)]
    return [tensor for tensor in tensors if tensor is not None]


@torch.no_grad()
def average_statistics(statistics: list[Tensor], world_size: int) -> None:
    """Replace each tensor by its mean over all ranks, in one all-reduce."""
    if world_size == 1 or not statistics:
        return
    flat = torch.cat([tensor.flatten() for tensor in statistics])
    dist.all_reduce(flat)  # sums over the ranks
    parts = torch.split(flat / world_size, [tensor.numel() for tensor in statistics])
    for tensor, part in zip(statistics, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
