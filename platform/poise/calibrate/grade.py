"""Whether an answer is right."""

from __future__ import annotations

from collections.abc import Iterable

from poise.calibrate.cluster import normalised
from poise.calibrate.extract import MARKERS

__all__ = ["matches_alias"]


def matches_alias(answer: str, accepted: Iterable[str]) -> bool:
    """Whether `answer` equals any accepted answer after `normalised`. Part of an answer is not enough."""
    return answer not in MARKERS and normalised(answer) in {normalised(alias) for alias in accepted}
