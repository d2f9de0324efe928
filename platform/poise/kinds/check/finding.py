"""What a check of a spec returns: a `Finding` in one section, a `Mistake` at a path of the whole spec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import NamedTuple

from poise.spec.problems import Path

__all__ = ["Finding", "Mistake", "absolute_path_hint"]


@dataclass(frozen=True)
class Mistake:
    """A reason why the spec cannot run as it is.

    Attributes:
        path: where in the spec it is.
        message: what is wrong and what to write instead.
        absent: something is not on this machine, but may be on another one.
        is_note: the spec can run; the message is printed only.
    """

    path: Path
    message: str
    absent: bool = False
    is_note: bool = False


class Finding(NamedTuple):
    """A key of one section and what is wrong with it.

    Attributes:
        key: dotted path of the key below the section.
        message: what is wrong and what to write instead.
        absent: something is not on this machine, but may be on another one.
        is_note: the spec can run; the message is printed only.
    """

    key: str
    message: str
    absent: bool = False
    is_note: bool = False


def absolute_path_hint(path: FilePath) -> str:
    """The path as text; after a relative path, the absolute path that it has from the current folder."""
    return str(path) if path.is_absolute() else f"{path} (here: {path.absolute()})"
