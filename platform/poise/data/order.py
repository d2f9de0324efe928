"""The order of training examples: the validation split, the permutation of each epoch, and the share of each rank."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import UserError
from poise.spec.seeds import derive_seed

__all__ = ["GlobalBatches", "hold_out", "rank_slice"]


def hold_out(num_examples: int, num_validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """The indices of the examples that are trained on, and of those held out, each int64 in ascending order.

    Raises:
        UserError: no example is left to train on.
    """
    if num_validation >= num_examples:
        raise UserError(
            f"data.validation: {num_validation} held out of {num_examples} training examples leaves none to train on"
        )
    order = _permutation(num_examples, derive_seed(seed, "validation"))
    return order[num_validation:].sort().values, order[:num_validation].sort().values


def rank_slice(num_items: int, rank: int, world_size: int) -> slice:
    """The share of a rank, of consecutive items; `num_items` is a multiple of `world_size`."""
    size = num_items // world_size
    return slice(rank * size, (rank + 1) * size)


class GlobalBatches:
    """The examples of each global batch: a pure function of the arguments and of the index of the batch.

    An epoch is one seeded permutation of the examples, cut into `per_epoch` global batches. Examples that do not fill a
    last batch are dropped; each epoch drops different ones. Ranks take equal slices of a global batch, so that all
    ranks together see what a single worker would see.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        *,
        key: str,
        device: torch.device | str = "cpu",
    ) -> None:
        """`batch_size` is the sum over all ranks, `key` the key of the spec that sets it, `device` that of the indices.

        Raises:
            UserError: fewer examples than one batch, or a batch that the ranks cannot share equally.
        """
        if num_examples < batch_size:
            raise UserError(f"{key}: {batch_size} is more than the {num_examples} training examples")
        if batch_size % world_size:
            raise UserError(f"{key}: {batch_size} examples cannot be shared equally by {world_size} workers")
        self.batch_size = batch_size
        self.per_epoch = num_examples // batch_size
        self.share = rank_slice(batch_size, rank, world_size)
        """The examples of this rank within a global batch."""
        self._num_examples = num_examples
        self._seed = seed
        self._device = device
        # the permutation of the epoch that was read last
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def rows(self, index: int) -> Tensor:
        """The indices (batch_size,) of the examples of global batch `index`, counted from 0 over all epochs."""
        epoch, number = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            order = _permutation(self._num_examples, derive_seed(self._seed, "order", epoch))
            self._order = order.to(self._device)
            self._epoch = epoch
        start = number * self.batch_size
        return self._order[start : start + self.batch_size]


def _permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
