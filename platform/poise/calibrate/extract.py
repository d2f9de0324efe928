"""Extraction of the short answer from a response.

Increase VERSION when a rule changes, since every measured number depends on it.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

__all__ = ["EMPTY", "MARKERS", "NO_ANSWER", "VERSION", "Rule", "extract"]

VERSION = 2

EMPTY = "<EMPTY>"
NO_ANSWER = "<NOANSWER>"
MARKERS = frozenset({EMPTY, NO_ANSWER})
"""The markers of a blank answer and of a missing one. They are not answers, and never correct."""

Rule = Literal["line", "whole"]
"""line: the rest of the line of the last `Answer:`; whole: the whole response."""

_LINE_END = re.compile(r"\r\n|\r|\n")
_ANSWER = re.compile(r"\banswer\s*[:\uff1a]\s*", re.IGNORECASE)
_CONFIDENCE = re.compile(r"\bconfidence\s*(?:[:=\uff1a]|is\b|\d)", re.IGNORECASE)
_QUESTION = re.compile(r"\s*(?:question|q)\s*\d*\s*[:\uff1a]", re.IGNORECASE)
_EMPHASIS = re.compile(r"(\*\*|\*|`|(?<!\w)__|(?<!\w)_)(?=\S)(.{1,100}?)(?<=\S)\1(?!\w)")


def extract(response: str, *, finished: bool, rule: Rule) -> str:
    """The answer in a response; `finished` is False where the response was cut at its largest length.

    With rule="line": the text after the last `Answer:` on its line, or the next line with text if nothing follows,
    without bold marks and without a `Confidence:` after it. From a line `Question:` after an answer on, the response is
    ignored: there a model asks and answers further questions by itself. With rule="whole": the whole response.

    A blank answer is EMPTY. The result is NO_ANSWER if the response has no `Answer:`, or was cut before the answer
    ended; the end of such a response would be a guess. The time is linear in the length of the response. ValueError for
    another rule.
    """
    if rule == "line":
        return _last_line(response, finished)
    if rule != "whole":
        raise ValueError(f"the rule is 'line' or 'whole', not {rule!r}")
    return _or_empty(response) if finished else NO_ANSWER


def _last_line(response: str, finished: bool) -> str:
    lines = [_EMPHASIS.sub(r"\2", line) for line in _LINE_END.split(response)]
    answer = None
    is_open = False  # an `Answer:` with nothing after it: the next line with text is the answer
    number = -1
    for number, line in enumerate(lines):
        if answer is not None and not is_open and _QUESTION.match(line):
            return _or_empty(answer)
        pieces = _ANSWER.split(line)
        if len(pieces) > 1:
            answer = _before_confidence(pieces[-1])
            is_open = not pieces[-1].strip()
            answer_line = number
        elif is_open and line.strip():
            answer = _before_confidence(line)
            is_open = False
            answer_line = number
    if answer is None:
        return NO_ANSWER
    # a confidence after the answer shows that the answer had ended
    was_cut = not finished and answer_line == number and not _CONFIDENCE.search(lines[number])
    if was_cut or (is_open and not finished):
        return NO_ANSWER
    return _or_empty(answer)


def _before_confidence(line: str) -> str:
    confidence = _CONFIDENCE.search(line)
    if confidence is None:
        return line
    return line[: confidence.start()].rstrip(" \t,;.([-")


def _or_empty(text: str) -> str:
    """The text without white space around it, or EMPTY if it has no visible character."""
    stripped = text.strip()
    is_blank = all(unicodedata.category(character) in ("Cf", "Zs", "Zl", "Zp", "Cc") for character in stripped)
    return EMPTY if is_blank else stripped
