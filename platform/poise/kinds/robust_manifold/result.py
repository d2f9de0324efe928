"""The result of attacking classifiers on the data manifold, off it, and in the full ball."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from poise.kinds.common.attack_description import AttackDescription
from poise.store.result import ResultModel, RunResult

__all__ = ["ClassifierResult", "EigenspaceResult", "LatentResult", "RobustManifoldResult", "SubspaceResult"]


class EigenspaceResult(ResultModel):
    """The eigenspaces that stand for the manifold."""

    rank: int
    shared: bool


class SubspaceResult(ResultModel):
    """How far perturbations leave their subspace, means over the images; None where none was attacked."""

    residual: float | None
    share: float | None
    clipped: float | None


class LatentResult(ResultModel):
    """Accuracy on reconstructions and under attacks on the codes, and the success of the latter."""

    reconstruction: float | None
    accuracy: float | None
    success: float | None


class ClassifierResult(ResultModel):
    """One attacked network.

    Keys of `accuracy`, `success` and `residual` are "<where>/<norm>", where: full, on_manifold, off_manifold.
    """

    run: str
    selected: str
    step: int
    objective: str
    num_examples: int
    attacks: dict[str, AttackDescription] = Field(description="by norm")
    dimensions: dict[str, int] = Field(description="of the space that is searched, by where")
    explained: float = Field(description="share of the variance that lies in the eigenspaces")
    distance: float | None = Field(description="mean distance of the images to their eigenspace")
    clean: float
    accuracy: dict[str, float]
    success: dict[str, float | None]
    residual: dict[str, SubspaceResult]
    latent: LatentResult | None


class RobustManifoldResult(RunResult):
    """The attacked networks, in the order of the spec."""

    kind: Literal["robust.manifold"] = "robust.manifold"
    eigenspace: EigenspaceResult
    latent: str | None = Field(description="the attack on codes, in words")
    classifiers: list[ClassifierResult]
