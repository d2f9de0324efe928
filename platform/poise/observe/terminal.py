"""Text that others wrote, on its way to a terminal."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """The text with every control character as its escape, line breaks and tabs aside.

    A terminal obeys what it is sent: the name of a run or a message in a store could move the cursor or clear lines.
    """
    return "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1] for sign in text)
