"""A stratified subset of a data set: the same share of each class, and the same rows for every seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["stratified_rows"]


def stratified_rows(labels: npt.NDArray[np.integer], n: int | None) -> npt.NDArray[np.int64]:
    """Increasing indices (n,) of a stratified subset of labels (N,); all indices when `n` is None or at least N.

    Each class is shuffled by a fixed seed and contributes the same share of its rows, also in a set that is sorted by
    class. The indices depend on the labels alone: runs of all seeds are compared on the same rows, and a smaller
    subset is contained in every larger one.
    """
    total = len(labels)
    if n is None or n >= total:
        return np.arange(total)
    position = np.random.default_rng(0).permutation(total)
    by_class = np.lexsort((position, labels))  # rows grouped by class, shuffled within each class
    _, first, inverse, counts = np.unique(labels[by_class], return_index=True, return_inverse=True, return_counts=True)
    rank = np.arange(total) - first[inverse]  # place of each row within its class, in the shuffled order
    share = (rank + 0.5) / counts[inverse]  # share of its class that has been taken when this row is taken
    # rows with the smallest shares first: all classes advance at the same rate
    order = np.lexsort((position[by_class], share))
    return np.sort(by_class[order[:n]])
