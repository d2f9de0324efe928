"""Texts about the cost of a run."""

from __future__ import annotations

__all__ = ["UNCHECKED_COST", "in_bytes"]

UNCHECKED_COST = "the cost depends on code of yours: it is known when the code is allowed, with --allow-code"
"""The line instead of the cost of a run whose method is code that is not allowed to run."""


def in_bytes(count: int) -> str:
    """A number of bytes with a binary unit, such as 1.5 MiB."""
    size = float(count)
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size /= 1024
        unit = larger
    return f"{size:.4g} {unit}"
