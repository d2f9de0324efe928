"""The short answer in what a model wrote. A rule that changes gets a new VERSION, since every number depends on it."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

__all__ = ["EMPTY", "MARKERS", "NO_ANSWER", "VERSION", "Rule", "extract"]

VERSION = 2

EMPTY, NO_ANSWER = "<EMPTY>", "<NOANSWER>"
MARKERS = frozenset({EMPTY, NO_ANSWER})
"""What stands for an answer that is blank, and for one that never came: they are no answers, and never correct."""

Rule = Literal["line", "whole"]
"""line: the rest of the line of the last `Answer:`; whole: the whole response."""

_LINE_END = re.compile(r"\r\n|\r|\n")
_ANSWER = re.compile(r"\banswer\s*[:\uff1a]\s*", re.IGNORECASE)
_CONFIDENCE = re.compile(r"\bconfidence\s*(?:[:=\uff1a]|is\b|\d)", re.IGNORECASE)
_QUESTION = re.compile(r"\s*(?:question|q)\s*\d*\s*[:\uff1a]", re.IGNORECASE)
_EMPHASIS = re.compile(r"(\*\*|\*|`|(?<!\w)__|(?<!\w)_)(?=\S)(.{1,100}?)(?<=\S)\1(?!\w)")


def extract(response: str, *, finished: bool, rule: Rule) -> str:
    """The answer in a response; `finished` is False where the response was cut at its largest length.

    With rule="line": what follows the last `Answer:` on its line, or the next line with text where nothing follows,
    without bold marks and without a `Confidence:` behind it. What a model goes on to ask and answer by itself, from a
    line `Question:` after its answer on, is not looked at. With rule="whole": the whole response.

    A blank answer is EMPTY. NO_ANSWER stands where a response has no `Answer:`, or was cut before the answer ended;
    never the tail of a response, which would be a guess. The time is linear in the length of the response. ValueError
    for another rule.
    """
    if rule == "line":
        return _last_line(response, finished)
    if rule != "whole":
        raise ValueError(f"the rule is 'line' or 'whole', not {rule!r}")
    return _or_empty(response) if finished else NO_ANSWER


def _last_line(response: str, finished: bool) -> str:
    lines = [_EMPHASIS.sub(r"\2", line) for line in _LINE_END.split(response)]
    answer, is_open, number = None, False, -1
    for number, line in enumerate(lines):
        if answer is not None and not is_open and _QUESTION.match(line):
            return _or_empty(answer)
        pieces = _ANSWER.split(line)
        if len(pieces) > 1:
            answer, is_open = _before_confidence(pieces[-1]), not pieces[-1].strip()
            ends_here = number
        elif is_open and line.strip():
            answer, is_open = _before_confidence(line), False
            ends_here = number
    if answer is None:
        return NO_ANSWER
    was_cut = not finished and ends_here == number and not _CONFIDENCE.search(lines[number])
    return NO_ANSWER if was_cut or (is_open and not finished) else _or_empty(answer)


def _before_confidence(line: str) -> str:
    found = _CONFIDENCE.search(line)
    return line[: found.start()].rstrip(" \t,;.([-") if found else line


def _or_empty(text: str) -> str:
    """The text without white space around it, or EMPTY where nothing of it can be seen."""
    seen = text.strip()
    is_blank = all(unicodedata.category(character) in ("Cf", "Zs", "Zl", "Zp", "Cc") for character in seen)
    return EMPTY if is_blank else seen
