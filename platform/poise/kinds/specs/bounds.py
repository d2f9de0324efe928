"""`kind: bounds.report`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from poise.robust.spec import Threats
from poise.spec import Real, RunName, RunSpec

__all__ = ["BoundsReportSpec"]


class BoundsReportSpec(RunSpec):
    """Operator norms of trained classifiers, the bounds made of them, and the gaps that were measured."""

    kind: Literal["bounds.report"]
    runs: list[RunName] = Field(
        min_length=1, max_length=1000, description="finished runs of robust.train; a sweep stands for all its trials"
    )
    threats: Threats | None = Field(
        None, description="what the adversary may do and how it searches; default, of each run, that of its test"
    )
    examples: int = Field(
        1000, ge=2, description="first examples of the training and of the test split that margins and gaps are of"
    )
    percentile: Annotated[Real, Field(gt=0, lt=100)] = Field(
        Real("5"), description="which percentile of the clean training margins is the margin of the bounds"
    )
    radius: Literal["paper", "l2", "box"] = Field(
        "box", description="how far data can lie from the origin: as printed in the papers, tighter, tightest"
    )
    delta: Annotated[Real, Field(gt=0, lt=1)] = Field(Real("1/20"), description="probability that a bound may fail")

    def cost(self) -> list[str]:
        """What is measured; how large the networks are stands in their runs."""
        lines = [
            f"{len(self.runs)} runs: norms of each affine layer in float64, attacks on 2 x {self.examples:,} images"
        ]
        if self.threats:
            gradients = sum(threat.steps * threat.restarts for _, threat in self.threats.items())
            lines.append(f"at most {2 * self.examples * gradients:,} image gradients for each of them")
        return lines
