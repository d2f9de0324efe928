"""Text that others wrote, on its way to a terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["plain_warnings", "printable"]


def printable(text: str) -> str:
    """The text with every control character as its escape, line breaks and tabs aside.

    A terminal obeys what it is sent: the name of a run or a message in a store could move the cursor or clear lines.
    """
    return "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1] for sign in text)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside, a warning is written as one line for the user of the command, without the line of code that gave it.

    Filters and whoever records warnings are left alone.
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
