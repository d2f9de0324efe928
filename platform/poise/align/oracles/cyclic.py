"""An oracle under which no answer is best."""

from __future__ import annotations

from typing import Literal

from poise.align.oracles.base import OracleOptions

__all__ = ["Cyclic"]


class Cyclic(OracleOptions):
    """Preferences over the first three answers of a question: each beats the next, and the last beats the first."""

    name: Literal["cyclic"] = "cyclic"

    @property
    def rows(self) -> list[list[float]]:
        """P[i][j], the probability that answer i is preferred to answer j; equilibrium (1/3, 2/9, 4/9)."""
        return [[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]]
