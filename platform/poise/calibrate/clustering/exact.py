"""Classes of answers that are equal after normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from poise.calibrate.clustering.base import Clusterer, Clusters
from poise.calibrate.extract import MARKERS
from poise.calibrate.normalize import normalised

__all__ = ["ExactMatch"]


class ExactMatch(Clusterer):
    """Answers are in one class if they are equal after `normalised`; the question has no effect."""

    name: Literal["exact"] = Field("exact", description="equal answers, apart from case, articles and punctuation")

    def cluster(self, question: str, answers: Sequence[str]) -> Clusters:
        """The classes of equal answers. The markers of `extract` are classes of their own.

        Raises:
            TypeError: one text instead of a list of texts.
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
