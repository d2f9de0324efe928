"""The results of an evaluation stage by stage: the examples still to be attacked, accuracies and the final matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from poise.kinds.common.attack_stages import BoundStage
from poise.kinds.robust_evaluate.chunks import ChunkResult
from poise.kinds.robust_evaluate.result import StageSummary
from poise.store.parquet import to_parquet

__all__ = ["EvaluationResults", "StageResult"]


@dataclass
class EvaluationResults:
    """The results of the stages on `n` examples so far.

    Attributes:
        under: bool (n,) by column: the examples that are still correct after all stages of that column.
        stages: the result of each stage, in order.
    """

    n: int
    under: dict[str, Tensor] = field(default_factory=dict)
    stages: list[StageResult] = field(default_factory=list)

    def still_correct(self, stage: BoundStage) -> Tensor:
        """bool (n,): the examples that the stage is to attack."""
        columns = ("clean", *stage.threats, stage.column)
        # no stage has run yet: the clean one looks at every example
        if not any(column in self.under for column in columns):
            return torch.ones(self.n, dtype=torch.bool)
        return self._all_correct(columns)

    def add(self, stage: BoundStage, chunk_results: Sequence[ChunkResult]) -> None:
        """Add the chunk results of a stage."""
        attacked = self.still_correct(stage)
        after = attacked.clone()  # an example that was wrong before stays wrong
        for chunk_result in chunk_results:
            after[chunk_result.examples] = chunk_result.correct
        self.under[stage.column or "clean"] = after
        self.stages.append(StageResult(stage, attacked, after, chunk_results))

    def threats(self) -> dict[str, Tensor]:
        """By threat, bool (n,): the examples that withstood it; for a union of balls, also each ball of the union."""
        robust: dict[str, Tensor] = {}
        for part in self.stages[1:]:  # the first stage is the clean one
            stage = part.stage
            robust[stage.column] = self._all_correct(("clean", *stage.threats, stage.column))
        return robust

    def union(self) -> Tensor:
        """bool (n,): the examples that withstood every stage."""
        return torch.stack(list(self.under.values())).all(0)

    def accuracy(self) -> dict[str, float]:
        """Accuracies by measure: "clean", "robust/<threat>" for each threat, "robust/union"."""
        robust = {f"robust/{name}": _share(still_correct) for name, still_correct in self.threats().items()}
        return {"clean": _share(self.under["clean"]), **robust, "robust/union": _share(self.union())}

    def summaries(self) -> list[StageSummary]:
        """The summary of each stage."""
        union = torch.ones(self.n, dtype=torch.bool)
        summaries = []
        for part in self.stages:
            # an example that the stage did not attack is not held against it
            union = union & (part.after | ~part.attacked)
            summaries.append(part.summary(_share(union)))
        return summaries

    def matrix(self) -> bytes:
        """Parquet with a row per example: each stage (null where it did not attack), each threat, the union."""
        columns: dict[str, pa.Array] = {"example": pa.array(range(self.n))}
        for part in self.stages:
            columns[part.stage.name] = pa.array(part.after.numpy(), mask=~part.attacked.numpy())
        for name, still_correct in {**self.threats(), "union": self.union()}.items():
            columns[f"robust/{name}"] = pa.array(still_correct.numpy())
        return to_parquet(pa.table(columns))

    def _all_correct(self, columns: Sequence[str]) -> Tensor:
        """bool (n,): the examples that are still correct under all of these columns that have been attacked."""
        return torch.stack([self.under[column] for column in columns if column in self.under]).all(0)


@dataclass(frozen=True)
class StageResult:
    """The result of one stage, bool (n,): the examples that it `attacked`, and those still correct `after` it."""

    stage: BoundStage
    attacked: Tensor
    after: Tensor
    chunk_results: Sequence[ChunkResult]

    @property
    def seconds(self) -> float:
        """The time of all its chunks, on all workers together."""
        return sum(chunk_result.seconds for chunk_result in self.chunk_results)

    def summary(self, union: float) -> StageSummary:
        """`union`: the share of all examples that withstood every stage up to this one."""
        return StageSummary(
            name=self.stage.name,
            threat=self.stage.column,
            attack=self.stage.words,
            attacked=int(self.attacked.sum()),
            fooled=int((self.attacked & ~self.after).sum()),
            still_correct=_share(self.after),
            union=union,
            gradients=sum(chunk_result.gradients for chunk_result in self.chunk_results),
            queries=sum(chunk_result.queries for chunk_result in self.chunk_results),
        )


def _share(still_correct: Tensor) -> float:
    return float(still_correct.double().mean())
