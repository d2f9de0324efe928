"""The batches of every optimizer step, such that an epoch is one pass over the training set.

An epoch of 7 batches with `accumulate: 3` has three steps: of batches 0-2, of batches 3-5, and of batch 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["EpochPlan"]


@dataclass(frozen=True)
class EpochPlan:
    """Steps and batches are counted from 0 over the whole run.

    Attributes:
        batches: number of batches of one epoch.
        accumulate: number of batches of one step; the last step of an epoch takes the remaining ones.
        repeats: number of consecutive steps that use the same batches.
    """

    batches: int
    accumulate: int = 1
    repeats: int = 1

    @property
    def steps(self) -> int:
        """The number of optimizer steps of one epoch, at least one."""
        return self.repeats * max(1, math.ceil(self.batches / self.accumulate))

    def of_step(self, step: int) -> range:
        """The batches of a step."""
        epoch, offset = divmod(step, self.steps)
        return self._from(epoch, offset // self.repeats * self.accumulate)

    def with_batch(self, index: int) -> range:
        """The batches of the step that batch `index` belongs to."""
        epoch, offset = divmod(index, self.batches)
        return self._from(epoch, offset - offset % self.accumulate)

    def batches_before(self, step: int) -> int:
        """The number of batches used by the steps before this one; a repeated batch counts once per epoch."""
        return 0 if step == 0 else self.of_step(step - 1).stop

    def _from(self, epoch: int, offset: int) -> range:
        """Up to `accumulate` batches of an epoch from `offset` on."""
        first = epoch * self.batches
        end = min(offset + self.accumulate, max(1, self.batches))
        return range(first + offset, first + end)
