"""What examples have withstood, stage by stage: who is still to be attacked, and the matrix in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from poise.kinds.attacks import BoundStage
from poise.kinds.verdicts import Verdict

__all__ = ["Findings", "Part"]


@dataclass
class Findings:
    """What `n` examples have withstood so far: by threat, and the part of each stage."""

    n: int
    under: dict[str, Tensor] = field(default_factory=dict)
    stages: list[Part] = field(default_factory=list)

    def standing(self, stage: BoundStage) -> Tensor:
        """bool (n,): the examples that the stage is to attack."""
        names = ("clean", *stage.threats, stage.column)
        known = [self.under[name] for name in names if name in self.under]
        return torch.stack(known).all(0) if known else torch.ones(self.n, dtype=torch.bool)

    def add(self, stage: BoundStage, verdicts: Sequence[Verdict]) -> None:
        """Take in the verdicts of a stage."""
        attacked = self.standing(stage)
        after = attacked.clone()
        for verdict in verdicts:
            after[verdict.examples] = verdict.correct
        self.under[stage.column or "clean"] = after
        self.stages.append(Part(stage, attacked, after, verdicts))

    def threats(self) -> dict[str, Tensor]:
        """By threat, bool (n,): the examples that have withstood it; a union of balls, each of them too."""
        columns = {part.stage.column: ("clean", *part.stage.threats, part.stage.column) for part in self.stages[1:]}
        return {
            column: torch.stack([self.under[name] for name in names if name in self.under]).all(0)
            for column, names in columns.items()
        }

    def union(self) -> Tensor:
        """bool (n,): the examples that have withstood everything."""
        return torch.stack(list(self.under.values())).all(0)

    def accuracy(self) -> dict[str, float]:
        """ "clean", "robust/<threat>" for each, "robust/union"."""
        robust = {f"robust/{name}": _share(standing) for name, standing in self.threats().items()}
        return {"clean": _share(self.under["clean"]), **robust, "robust/union": _share(self.union())}

    def told(self) -> list[dict[str, Any]]:
        """Each stage for the summary."""
        running, told = torch.ones(self.n, dtype=torch.bool), []
        for part in self.stages:
            running = running & (part.after | ~part.attacked)
            told.append(part.told(_share(running)))
        return told

    def matrix(self) -> bytes:
        """Parquet, a row per example: clean, each stage (null where it had fallen before), each threat, the union."""
        columns: dict[str, pa.Array] = {"example": pa.array(range(self.n))}
        for part in self.stages:
            columns[part.stage.name] = pa.array(part.after.numpy(), mask=~part.attacked.numpy())
        for name, standing in {**self.threats(), "union": self.union()}.items():
            columns[f"robust/{name}"] = pa.array(standing.numpy())
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        return bytes(sink.getvalue())


@dataclass(frozen=True)
class Part:
    """What one stage did: bool (n,) `attacked`, and those of them that stand `after` it."""

    stage: BoundStage
    attacked: Tensor
    after: Tensor
    verdicts: Sequence[Verdict]

    def told(self, union: float) -> dict[str, Any]:
        """For the summary; `union` is the share of all that has withstood everything up to this stage."""
        return {
            "name": self.stage.name,
            "threat": self.stage.column,
            "attack": self.stage.words,
            "attacked": int(self.attacked.sum()),
            "fooled": int((self.attacked & ~self.after).sum()),
            "standing": _share(self.after),
            "union": union,
            "gradients": sum(verdict.gradients for verdict in self.verdicts),
            "queries": sum(verdict.queries for verdict in self.verdicts),
        }


def _share(standing: Tensor) -> float:
    return float(standing.double().mean())
