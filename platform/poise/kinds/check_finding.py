"""What is wrong with one section of a spec, as the functions return it that look at what the section names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["Finding", "shown"]


class Finding(NamedTuple):
    """The key that is at fault, dotted, and what is wrong with it.

    Attributes:
        absent: something is not on this machine, and may be on another.
        is_note: it does not keep the spec from running; it is only said.
    """

    key: str
    message: str
    absent: bool = False
    is_note: bool = False


def shown(place: Path) -> str:
    """A path for people: where a relative one leads from here, too."""
    return str(place) if place.is_absolute() else f"{place} (here: {place.absolute()})"
