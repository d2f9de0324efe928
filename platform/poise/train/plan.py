"""Which batches every optimizer step learns from, so that an epoch is a pass over the training set.

An epoch of 7 batches with `accumulate: 3` is three steps: of batches 0-2, 3-5, and the one that is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["EpochPlan"]


@dataclass(frozen=True)
class EpochPlan:
    """Steps and batches are counted from 0 over the whole run.

    batches: of one epoch. accumulate: batches of one step; the last step of an epoch takes those that are left.
    repeats: steps in a row that learn from the same batches.
    """

    batches: int
    accumulate: int = 1
    repeats: int = 1

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch, at least one."""
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
        """How many batches the steps before this one have begun to learn from, each counted once an epoch."""
        return 0 if step == 0 else self.of_step(step - 1).stop

    def _from(self, epoch: int, offset: int) -> range:
        first = epoch * self.batches
        return range(first + offset, first + min(offset + self.accumulate, max(1, self.batches)))
