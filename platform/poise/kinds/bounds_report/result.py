"""The result of a report on bounds: norms, margins, bounds and measured gaps of each network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from poise.kinds.common.attack_description import AttackDescription
from poise.store.result import ResultModel, RunResult, Score

__all__ = ["BoundsReportResult", "LayerResult", "MarginResult", "NetworkResult"]


class LayerResult(ResultModel):
    """Bounds of the spectral norm of one affine layer as an operator: from below, and a certified one from above."""

    name: str
    sigma_lo: float
    sigma_hi: float


class MarginResult(ResultModel):
    """The percentile of the clean margins, the margin used for bounds, and the share of training images below it."""

    percentile: float
    used: float
    below: float


class NetworkResult(ResultModel):
    """One network. `accuracy` is by split and measure; `radius`, `bounds` by risk ("clean", "robust")."""

    run: str = Field(description="name of its run, or of its file or function")
    selected: str
    step: int | None
    attacks: dict[str, AttackDescription] = Field(description="by norm")
    accuracy: dict[str, dict[str, Score]]
    gap: dict[str, Score] = Field(description="training minus test accuracy, by measure")
    samples: int = Field(description="training images")
    depth: int
    width: int
    parameters: int
    homogeneous: bool
    fixes_zero: bool
    left_out: list[str] = Field(description="which bounds do not apply, and why")
    radius: dict[str, float] = Field(description="largest 2-norm of an input, by risk")
    margin: MarginResult | None
    log10: dict[str, Score] = Field(description="log10 of products of norms and of complexities")
    bounds: dict[str, dict[str, Score | None]] = Field(description="log10 of each bound on the gap, by risk")
    decomposition: dict[str, Score | None] = Field(description="log10 of the factors of a bound")
    layers: list[LayerResult]


class BoundsReportResult(RunResult):
    """The networks, in the order of the spec. All norms of their layers are in `artifacts/bounds.json`."""

    kind: Literal["bounds.report"] = "bounds.report"
    num_examples: int = Field(description="images of each split for margins and gaps")
    percentile: float
    margins: str
    radius: str
    delta: float
    bounds: dict[str, str] = Field({}, description="the bounds that tables show, in their order: label by name")
    networks: list[NetworkResult]

    def num_examples_of(self, split: str) -> int | None:
        """The images of a held-out split that the networks are measured on."""
        return None if split == "train" else self.num_examples

    def facts(self) -> Iterator[tuple[str, str]]:
        """How many images there were."""
        yield "examples", f"{self.num_examples:,}"
