"""What a check of a spec, or of a section of a spec, returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path as FilePath

from poise.spec.problems import Path

__all__ = ["FieldError", "absolute_path_hint"]


@dataclass(frozen=True)
class FieldError:
    """A reason why the spec cannot run as it is.

    Attributes:
        path: where it is in the spec, or in the section that was checked.
        message: what is wrong and what to write instead.
        absent: something is not on this machine, but may be on another one.
        is_note: the spec can run; the message is printed only.
    """

    path: Path
    message: str
    absent: bool = False
    is_note: bool = False

    def below(self, section: Path) -> FieldError:
        """The same error, whose path was that within a section of the spec."""
        return replace(self, path=(*section, *self.path))


def absolute_path_hint(path: FilePath) -> str:
    """The path as text; after a relative path, the absolute path that it has from the current folder."""
    return str(path) if path.is_absolute() else f"{path} (here: {path.absolute()})"
