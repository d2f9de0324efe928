"""Oracles, by name: which of two answers to a prompt is preferred. All texts are raw, without a chat template.

One oracle is one file here and one line in `ORACLES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from poise.align.oracles.base import UNLISTED, MatrixOracle, Oracle, OracleOptions, with_other_answer
from poise.align.oracles.cyclic import Cyclic
from poise.align.oracles.matrix import Matrix
from poise.spec.registry import union_of

__all__ = [
    "ORACLES",
    "UNLISTED",
    "Cyclic",
    "Matrix",
    "MatrixOracle",
    "Oracle",
    "OracleOptions",
    "OracleSpec",
    "with_other_answer",
]

ORACLES: Mapping[str, type[OracleOptions]] = {
    "cyclic": Cyclic,
    "matrix": Matrix,
}
"""The class of each oracle section, by name. `ORACLES["cyclic"]().build(answers)` is an oracle."""

if TYPE_CHECKING:
    OracleSpec = OracleOptions
else:
    OracleSpec = union_of(ORACLES, OracleOptions, "poise.oracles")
    """The section `oracle` of a spec: one of `ORACLES`, or code of the user or of an installed package."""
