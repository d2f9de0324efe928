"""Words for the cost of a run."""

from __future__ import annotations

__all__ = ["in_bytes"]


def in_bytes(count: int) -> str:
    """A number of bytes as people read it."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"
