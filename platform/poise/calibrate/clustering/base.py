"""The base class of clustering back-ends, and the classes that they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from poise.spec.registry import MethodSection

__all__ = ["Clusterer", "Clusters"]


class Clusters(NamedTuple):
    """The class of each answer, numbered by first occurrence, and the first answer of each class as its label."""

    assign: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Answers in each class [K]."""
        sizes = Counter(self.assign)
        return tuple(sizes[k] for k in range(len(self.labels)))


class Clusterer(MethodSection, ABC):
    """Base of the back-ends: a section `clustering` of a spec, whose fields are the options of the back-end."""

    @abstractmethod
    def cluster(self, question: str, answers: Sequence[str]) -> Clusters:
        """The classes of the answers [n] to a question, numbered by first occurrence.

        The numbers decide ties between classes, so they must not depend on the order of a judge.
        """

    def describe(self) -> str:
        """The back-end and its options, for the protocol of a measurement; by default its name."""
        return self.name
