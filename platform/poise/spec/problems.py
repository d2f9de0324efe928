"""Mistakes in a spec, said to its author: file, line, path, what is wrong and the nearest valid name."""

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
    """One mistake. `line` counts from 1 and is 0 where the mistake has no line (a `--set`, a whole file)."""

    source: str
    line: int
    path: Path
    message: str

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line else self.source
        return f"{place}: {dotted(self.path)}: {self.message}" if self.path else f"{place}: {self.message}"


class SpecError(UserError):
    """Every mistake of a spec at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        total = f"{count} mistake{'s' if count > 1 else ''}; nothing was run."
        more = [f"and {count - _SHOWN} more"] if count > _SHOWN else []
        super().__init__("\n".join([*map(str, self.problems[:_SHOWN]), *more, total]))

    def __reduce__(self) -> tuple[type[SpecError], tuple[tuple[Problem, ...]]]:
        return SpecError, (self.problems,)  # from one process to another as it is


def dotted(path: Path) -> str:
    """`("space", "points", 2)` as `space.points[2]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint that ends a message: the nearest of `choices`, or all of them when none is near."""
    names = sorted(choices)
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(names)}" if names else ""
