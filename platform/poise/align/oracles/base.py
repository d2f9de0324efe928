"""What an oracle is, the base class of the sections of specs that name one, and the oracle of a preference matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from poise.align.games import Vector, preferences
from poise.spec.registry import MethodSection

__all__ = ["UNLISTED", "MatrixOracle", "Oracle", "OracleOptions", "with_other_answer"]

UNLISTED = 1e-3
"""The probability that an unlisted answer is preferred to a listed one. Unlisted answers tie with each other."""


class Oracle(Protocol):
    """Compares pairs of answers, with p(a, b) + p(b, a) = 1."""

    def compare(self, prompts: Sequence[str], left: Sequence[str], right: Sequence[str]) -> Tensor:
        """P(left[i] is preferred to right[i] as an answer to prompts[i]): float64 (n,) in [0, 1]."""


class MatrixOracle:
    """One preference matrix over the listed answers of every prompt, and `UNLISTED` for all other texts.

    Args:
        matrix: (n, n), see `games.preferences`.
        answers: the n listed answers of each prompt, in the order of the matrix.

    Raises:
        ValueError: an invalid preference matrix, or a prompt that does not have n different answers.
    """

    def __init__(self, matrix: ArrayLike, answers: Mapping[str, Sequence[str]]) -> None:
        self._table = with_other_answer(matrix)
        self._other = len(self._table) - 1  # the index that stands for every unlisted text
        self._indices: dict[str, dict[str, int]] = {}  # of the answers of each prompt
        for prompt, texts in answers.items():
            if isinstance(texts, str):
                raise ValueError(f"the answers of {prompt!r} are a list of texts, not one text")
            self._indices[prompt] = {text: index for index, text in enumerate(texts)}
        for prompt, indices in self._indices.items():
            if len(indices) != self._other:
                raise ValueError(
                    f"{prompt!r} has {len(indices)} different answers and the game is one of {self._other}"
                )

    def compare(self, prompts: Sequence[str], left: Sequence[str], right: Sequence[str]) -> Tensor:
        """See `Oracle.compare`. Raises KeyError for a prompt without listed answers."""
        rows = self._lookup(prompts, left)
        columns = self._lookup(prompts, right)
        return torch.from_numpy(self._table[rows, columns])

    def _lookup(self, prompts: Sequence[str], texts: Sequence[str]) -> list[int]:
        """The index of each text among the answers of its prompt."""
        return [self._indices[prompt].get(text, self._other) for prompt, text in zip(prompts, texts, strict=True)]


class OracleOptions(MethodSection, ABC):
    """Base of the section `oracle` of a spec: the preferences over the first n answers of each question."""

    @property
    @abstractmethod
    def rows(self) -> list[list[float]]:
        """P[i][j], the probability that answer i of a question is preferred to answer j: n rows of n numbers."""

    def build(self, answers: Mapping[str, Sequence[str]]) -> Oracle:
        """The oracle for questions with these answers, by prompt. ValueError as `MatrixOracle`."""
        return MatrixOracle(self.rows, answers)


def with_other_answer(matrix: ArrayLike) -> Vector:
    """The game with one more answer that stands for every unlisted text: (n + 1, n + 1)."""
    listed = preferences(matrix)
    size = len(listed) + 1
    table = np.full((size, size), UNLISTED)
    table[:-1, -1] = 1 - UNLISTED
    table[-1, -1] = 0.5
    table[:-1, :-1] = listed
    return table
