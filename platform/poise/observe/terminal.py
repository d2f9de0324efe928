"""Safe output to a terminal of text that other people wrote."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["plain_warnings", "printable"]


def printable(text: str) -> str:
    """The text with every control character except line breaks and tabs replaced by its escape.

    Otherwise the name of a run or a message in a store could move the cursor of the terminal or clear lines.
    """
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """While the block runs, write each warning as one line, without the line of code that raised it.

    Does not change filters or the recording of warnings.
    """
    before = warnings.formatwarning
    warnings.formatwarning = _plain_warning
    try:
        yield
    finally:
        warnings.formatwarning = before


def _plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"poise: warning: {' '.join(printable(str(message)).split())}\n"
