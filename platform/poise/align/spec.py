"""The alignment sections of a spec: the preference oracle, and the self-play method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.spec import ExactNumber, SpecModel, field_error

__all__ = ["Cyclic", "Matrix", "MethodSpec", "Mpo", "NashRs", "OracleSpec"]

_Positive = Annotated[ExactNumber, Field(gt=0)]
_Probability = Annotated[ExactNumber, Field(ge=0, le=1)]


class Cyclic(SpecModel):
    """Preferences over the first three answers of a question: each beats the next, and the last beats the first."""

    name: Literal["cyclic"]

    @property
    def rows(self) -> list[list[float]]:
        """P[i][j], the probability that answer i is preferred to answer j; equilibrium (1/3, 2/9, 4/9)."""
        return [[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]]


class Matrix(SpecModel):
    """A preference matrix over the first answers of each question, as many as it has rows."""

    name: Literal["matrix"]
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


OracleSpec = Annotated[Cyclic | Matrix, Field(discriminator="name")]


class Mpo(SpecModel):
    """Magnetic preference optimization: self-play with a KL term to a magnet, which periodically becomes the policy."""

    name: Literal["mpo"]
    alpha: _Positive = Field(ExactNumber("0.3"), description="coefficient of KL(policy || magnet)")
    eta: _Positive = Field(
        ExactNumber(1), description="step size: 1 / eta is the coefficient of KL(policy || previous policy)"
    )
    period: int = Field(
        ge=2, description="iterations after which the magnet becomes the policy; below about 10 it may diverge"
    )
    opponents: int = Field(8, ge=1, le=4096, description="responses of the current policy to compare each rollout with")
    inner_steps: int = Field(
        2, ge=2, le=1000, description="optimizer steps per iteration; in the first of them eta has no effect"
    )


class NashRs(SpecModel):
    """Nash learning by rejection sampling: against those responses of the reference that the policy does not beat."""

    name: Literal["nash_rs"]
    tau: _Positive = Field(
        ExactNumber("0.2"), description="temperature of rejection, and coefficient of KL(policy || reference)"
    )
    proposals: int = Field(64, ge=2, le=4096, description="responses of the reference per question, drawn once")
    inner_steps: int = Field(1, ge=1, le=1000, description="optimizer steps per iteration")


MethodSpec = Annotated[Mpo | NashRs, Field(discriminator="name")]
