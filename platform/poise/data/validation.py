"""The default size of a validation split."""

from __future__ import annotations

__all__ = ["num_validation"]


def num_validation(requested: int | None, total: int) -> int:
    """How many of `total` training examples are held out: a tenth, at most 1000, unless the spec requests a number."""
    return min(1000, total // 10) if requested is None else requested
