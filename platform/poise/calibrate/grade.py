"""Whether an answer is right."""

from __future__ import annotations

from collections.abc import Iterable

from poise.calibrate.extract import MARKERS
from poise.calibrate.normalize import normalised

__all__ = ["matches_alias"]


def matches_alias(answer: str, accepted: Iterable[str]) -> bool:
    """Whether `answer` equals any accepted answer after `normalised`. Part of an answer is not enough.

    TypeError where `accepted` is one text: its letters are no answers.
    """
    if isinstance(accepted, str):
        raise TypeError("accepted answers are a list of texts, not one text")
    return answer not in MARKERS and normalised(answer) in {normalised(alias) for alias in accepted}
