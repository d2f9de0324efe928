"""A part of a data set that stands for the whole: the same share of each class, and the same rows for everybody."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["stratified_rows"]


def stratified_rows(labels: npt.NDArray[np.integer], n: int | None) -> npt.NDArray[np.int64]:
    """Indices (n,) of a stratified choice out of labels (N,), increasing; all of them when `n` is None or at least N.

    Each class is shuffled by a fixed seed, and the choice takes its rows in equal shares: of a set that is sorted by
    class as of any other. It depends on nothing but the labels, so that runs of all seeds compare on the same rows, and
    a smaller choice is a part of every larger one.
    """
    total = len(labels)
    if n is None or n >= total:
        return np.arange(total)
    position = np.random.default_rng(0).permutation(total)
    by_class = np.lexsort((position, labels))
    _, first, inverse, counts = np.unique(labels[by_class], return_index=True, return_inverse=True, return_counts=True)
    rank = np.arange(total) - first[inverse]  # of each row within its class, in the shuffled order
    share = (rank + 0.5) / counts[inverse]  # how much of its class has been taken once it is
    return np.sort(by_class[np.lexsort((position[by_class], share))[:n]])
