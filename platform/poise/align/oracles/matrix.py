"""An oracle whose preferences the spec lists."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.align.oracles.base import OracleOptions
from poise.spec import ExactNumber, field_error

__all__ = ["Matrix"]

_Probability = Annotated[ExactNumber, Field(ge=0, le=1)]


class Matrix(OracleOptions):
    """A preference matrix over the first answers of each question, as many as it has rows."""

    name: Literal["matrix"] = "matrix"
    matrix: list[list[_Probability]] = Field(
        min_length=2, max_length=100, description="row i, column j: probability that answer i is preferred to answer j"
    )

    @model_validator(mode="after")
    def _antisymmetric(self) -> Matrix:
        size = len(self.matrix)
        if any(len(row) != size for row in self.matrix):
            raise field_error("matrix", f"{size} rows need {size} numbers each")
        for i, row in enumerate(self.matrix):
            for j, chance in enumerate(row[: i + 1]):
                if chance.exact + self.matrix[j][i].exact != 1:
                    raise field_error("matrix", f"row {i + 1}, column {j + 1} and its mirror must add up to 1")
        return self

    @property
    def rows(self) -> list[list[float]]:
        """P[i][j], the probability that answer i is preferred to answer j."""
        return [list(map(float, row)) for row in self.matrix]
