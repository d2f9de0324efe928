"""The alignment sections of a spec: who judges, and by which method a policy plays against itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.spec import Real, Section, mistake

__all__ = ["Cyclic", "Matrix", "MethodSpec", "Mpo", "NashRs", "OracleSpec"]

Positive = Annotated[Real, Field(gt=0)]
Chance = Annotated[Real, Field(ge=0, le=1)]


class Cyclic(Section):
    """Over the first three answers of a question: each beats the next, and the last the first."""

    name: Literal["cyclic"]

    @property
    def rows(self) -> list[list[float]]:
        """P[i][j], the probability that answer i is preferred to answer j; equilibrium (1/3, 2/9, 4/9)."""
        return [[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]]


class Matrix(Section):
    """A preference matrix over the first answers of each question, as many as it has rows."""

    name: Literal["matrix"]
    matrix: list[list[Chance]] = Field(
        min_length=2, max_length=100, description="row i, column j: probability that answer i is preferred to answer j"
    )

    @model_validator(mode="after")
    def _antisymmetric(self) -> Matrix:
        size = len(self.matrix)
        if any(len(row) != size for row in self.matrix):
            raise mistake("matrix", f"{size} rows need {size} numbers each")
        for i, row in enumerate(self.matrix):
            for j, chance in enumerate(row[: i + 1]):
                if chance.exact + self.matrix[j][i].exact != 1:
                    raise mistake("matrix", f"row {i + 1}, column {j + 1} and its mirror must add up to 1")
        return self

    @property
    def rows(self) -> list[list[float]]:
        """P[i][j], the probability that answer i is preferred to answer j."""
        return [[float(chance) for chance in row] for row in self.matrix]


OracleSpec = Annotated[Cyclic | Matrix, Field(discriminator="name")]


class Mpo(Section):
    """Magnetic preference optimization: against itself, held to a magnet that follows in periods."""

    name: Literal["mpo"]
    alpha: Positive = Field(Real("0.3"), description="coefficient of KL(policy || magnet)")
    eta: Positive = Field(Real(1), description="step: 1 / eta is the coefficient of KL(policy || policy before it)")
    period: int = Field(
        ge=2, description="iterations after which the magnet becomes the policy; below about 10 it may diverge"
    )
    opponents: int = Field(8, ge=1, le=4096, description="responses of the current policy that each rollout meets")
    inner_steps: int = Field(
        2, ge=2, le=1000, description="optimizer steps per iteration; in the first of them eta has no effect"
    )


class NashRs(Section):
    """Nash learning by rejection sampling: against the responses of the reference that the policy does not beat."""

    name: Literal["nash_rs"]
    tau: Positive = Field(
        Real("0.2"), description="temperature of rejection, and coefficient of KL(policy || reference)"
    )
    proposals: int = Field(
        64, ge=2, le=4096, description="responses of the reference per question, drawn once: all that is known of it"
    )
    inner_steps: int = Field(1, ge=1, le=1000, description="optimizer steps per iteration")


MethodSpec = Annotated[Mpo | NashRs, Field(discriminator="name")]
