"""Answers of equal meaning: a partition of the answers to one question into classes."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from poise.calibrate.extract import MARKERS

__all__ = ["Clusterer", "Clusters", "exact", "normalised"]

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_SIGN_OR_POINT = re.compile(r"(?<!\w)-(?=\d)|(?<=\d)\.(?=\d)")
_DECIMAL = re.compile(r"(-?\d+)\.0+|(-?\d+\.\d*[1-9])0+")
_ARTICLES = frozenset({"a", "an", "the"})


class Clusters(NamedTuple):
    """The class of each answer, numbered by first occurrence, and the first answer of each class as its label."""

    assign: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Answers in each class [K]."""
        found = Counter(self.assign)
        return tuple(found[k] for k in range(len(self.labels)))


Clusterer = Callable[[str, Sequence[str]], Clusters]
"""(question, answers [n]) -> their classes, numbered by first occurrence, so that no judge's order breaks a tie."""


def exact(question: str, answers: Sequence[str]) -> Clusters:
    """Answers are alike when they are equal after `normalised`, whatever the question."""
    keys = [normalised(answer) for answer in answers]
    index = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return Clusters(tuple(index[key] for key in keys), tuple(answers[keys.index(key)] for key in index))


def normalised(answer: str) -> str:
    """What is left of an answer without case, punctuation, articles and spacing; the markers of `extract` stay.

    As SQuAD does it (Rajpurkar et al., EMNLP 2016), after NFKC, but a sign and a decimal point stay, and a number is
    written one way: 1,000 is 1000, .50 is 0.5. Where nothing but articles or punctuation was said, they count.
    """
    if answer in MARKERS:
        return answer
    plain = unicodedata.normalize("NFKC", answer).lower().replace("\u2212", "-")
    plain = _BARE_POINT.sub("0.", _THOUSANDS.sub("", plain))
    words = [_DECIMAL.sub(r"\1\2", word) if _DECIMAL.fullmatch(word) else word for word in map(_word, plain.split())]
    words = [word for word in words if word]
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words) or " ".join(plain.split())


def _word(word: str) -> str:
    numeric = {found.start() for found in _SIGN_OR_POINT.finditer(word)}
    return "".join(c for i, c in enumerate(word) if i in numeric or not _is_punctuation(c))


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
