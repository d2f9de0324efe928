"""Oracles: who says which of two answers to a prompt is preferred. All texts are raw, without a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from poise.align.games import Vector, preferences

__all__ = ["UNLISTED", "MatrixOracle", "Oracle", "extended"]

UNLISTED = 1e-3
"""The probability with which what is no listed answer is preferred to a listed one; among themselves they tie."""


class Oracle(Protocol):
    """A judge of pairs that keeps p(a, b) + p(b, a) = 1."""

    def compare(self, prompts: Sequence[str], left: Sequence[str], right: Sequence[str]) -> Tensor:
        """P(left[i] is preferred to right[i] as an answer to prompts[i]): float64 (n,) in [0, 1]."""


class MatrixOracle:
    """One preference matrix over the listed answers of every prompt, and `UNLISTED` for all other texts.

    Args:
        matrix: (n, n), see `games.preferences`.
        answers: the n listed answers of each prompt, in the order of the matrix.

    Raises:
        ValueError: no preference matrix, or a prompt with other than n different answers.
    """

    def __init__(self, matrix: ArrayLike, answers: Mapping[str, Sequence[str]]) -> None:
        self._table = extended(matrix)
        self._places = {prompt: {text: place for place, text in enumerate(texts)} for prompt, texts in answers.items()}
        if texts := [prompt for prompt, listed in answers.items() if isinstance(listed, str)]:
            raise ValueError(f"the answers of {texts[0]!r} are a list of texts, not one text")
        for prompt, places in self._places.items():
            if len(places) != len(self._table) - 1:
                raise ValueError(
                    f"{prompt!r} has {len(places)} different answers and the game is one of {len(self._table) - 1}"
                )

    def compare(self, prompts: Sequence[str], left: Sequence[str], right: Sequence[str]) -> Tensor:
        """See `Oracle.compare`. Raises KeyError for a prompt without listed answers."""
        rows, columns = (
            [self._places[prompt].get(text, len(self._table) - 1) for prompt, text in zip(prompts, texts, strict=True)]
            for texts in (left, right)
        )
        return torch.from_numpy(self._table[rows, columns])


def extended(matrix: ArrayLike) -> Vector:
    """The game with one more answer that stands for every unlisted text: (n + 1, n + 1)."""
    known = preferences(matrix)
    table = np.full((len(known) + 1, len(known) + 1), UNLISTED)
    table[:-1, -1] = 1 - UNLISTED
    table[-1, -1] = 0.5
    table[:-1, :-1] = known
    return table
