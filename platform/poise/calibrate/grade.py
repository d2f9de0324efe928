"""Grading of short answers against a list of accepted answers."""

from __future__ import annotations

from collections.abc import Iterable

from poise.calibrate.extract import MARKERS
from poise.calibrate.normalize import normalised

__all__ = ["matches_alias"]


def matches_alias(answer: str, accepted: Iterable[str]) -> bool:
    """Whether `answer` equals any accepted answer after `normalised`. A part of an accepted answer is not enough.

    The markers of `extract` are never correct. TypeError if `accepted` is one text: its letters are not answers.
    """
    if isinstance(accepted, str):
        raise TypeError("accepted answers are a list of texts, not one text")
    if answer in MARKERS:
        return False
    return normalised(answer) in {normalised(alias) for alias in accepted}
