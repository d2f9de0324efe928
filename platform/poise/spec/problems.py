"""Errors in a spec for its author: file, line, path, what is wrong and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from poise.errors import UserError

__all__ = ["Path", "Problem", "SpecError", "dotted", "nearest"]

Path = tuple[str | int, ...]

_SHOWN = 50


@dataclass(frozen=True)
class Problem:
    """One error in a spec. `line` counts from 1; it is 0 for an error without a line (of a `--set` or a whole file)."""

    source: str
    line: int
    path: Path
    message: str

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line else self.source
        return f"{place}: {dotted(self.path)}: {self.message}" if self.path else f"{place}: {self.message}"


class SpecError(UserError):
    """All errors of a spec; the message lists the first 50."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = [str(problem) for problem in self.problems[:_SHOWN]]
        if count > _SHOWN:
            lines.append(f"and {count - _SHOWN} more")
        lines.append(f"{count} mistake{'s' if count > 1 else ''}; nothing was run.")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[SpecError], tuple[tuple[Problem, ...]]]:
        return SpecError, (self.problems,)  # pickled by its problems, not by its message


def dotted(path: Path) -> str:
    """A path for messages: `("space", "points", 2)` as `space.points[2]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def nearest(word: str, choices: Iterable[str]) -> str:
    """The hint at the end of a message: the choice most similar to `word`, or all choices when none is similar."""
    names = sorted(choices)
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(names)}" if names else ""
