"""Clustering of answers: a partition of the answers to one question into classes of equal meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from poise.calibrate.extract import MARKERS
from poise.calibrate.normalize import normalised

__all__ = ["Clusterer", "Clusters", "exact_match_clusters", "normalised"]


class Clusters(NamedTuple):
    """The class of each answer, numbered by first occurrence, and the first answer of each class as its label."""

    assign: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Answers in each class [K]."""
        sizes = Counter(self.assign)
        return tuple(sizes[k] for k in range(len(self.labels)))


Clusterer = Callable[[str, Sequence[str]], Clusters]
"""(question, answers [n]) -> their classes, numbered by first occurrence, so that no judge's order breaks a tie."""


def exact_match_clusters(question: str, answers: Sequence[str]) -> Clusters:
    """Classes of answers that are equal after `normalised`; the question has no effect.

    The markers of `extract` are classes of their own. TypeError for one text instead of a list of texts.
    """
    if isinstance(answers, str):
        raise TypeError("answers are a list of texts, not one text")
    index: dict[str, int] = {}
    labels: list[str] = []
    assign: list[int] = []
    for answer in answers:
        key = f"marker {answer}" if answer in MARKERS else f"answer {normalised(answer)}"
        if key not in index:
            index[key] = len(labels)
            labels.append(answer)
        assign.append(index[key])
    return Clusters(tuple(assign), tuple(labels))
