"""The short answer in what a model wrote. A rule that changes gets a new VERSION, since every number depends on it."""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["EMPTY", "MARKERS", "NO_ANSWER", "VERSION", "Rule", "extract"]

VERSION = 1

EMPTY, NO_ANSWER = "<EMPTY>", "<NOANSWER>"
MARKERS = frozenset({EMPTY, NO_ANSWER})
"""What stands for an answer that is blank, and for one that never came: classes of their own, and never correct."""

Rule = Literal["line", "whole"]
"""line: what follows the last `Answer:`, up to a line that begins with `Confidence`; whole: the whole response."""

_ANSWER = re.compile(r".*answer[^\S\n]*:(.*?)(?:\n\s*confidence.*)?", re.IGNORECASE | re.DOTALL)


def extract(response: str, *, finished: bool, rule: Rule) -> str:
    """The answer in a response; `finished` is False where the response was cut at its largest length.

    A blank answer is EMPTY. NO_ANSWER stands where a response has no `Answer:` line, or was cut before there was one;
    never the tail of a response, which would be a guess.
    """
    found = _ANSWER.fullmatch(response) if rule == "line" else None
    if found is None and (rule == "line" or not finished):
        return NO_ANSWER
    return (found[1] if found else response).strip() or EMPTY
