"""Robust accuracy on all ranks: each attacks its shard of the examples, and all get the whole result as a matrix."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import torch
from torch import Tensor, nn

from poise.data.images.datasets import ImageSet, to_float
from poise.kinds.common.attack_stages import bind_attack
from poise.robust.attacks import EVAL_ATTACKS
from poise.robust.evaluate import Evaluation, EvaluationAttack, evaluate
from poise.robust.spec import Threats
from poise.robust.threats import Threat
from poise.store.parquet import to_parquet
from poise.train.context import Context

__all__ = ["columns_of", "evaluate_shard", "matrix_to_parquet", "robust_accuracy"]


def robust_accuracy(
    model: nn.Module, images: ImageSet, threats: Threats, *, batch_size: int, seed: int, context: Context
) -> Evaluation:
    """Attack `model` on `images` under each threat.

    The noise of an example depends on `seed` and its index alone, so the result is the same on any number of ranks. All
    ranks call this and get the same evaluation, with rows in the order of `images`.
    """
    attacks: dict[str, EvaluationAttack] = {}
    for norm, threat_spec in threats.items():
        attack = EVAL_ATTACKS[threat_spec.attack]
        attacks[norm] = bind_attack(attack, Threat(norm, threat_spec.eps), **threat_spec.options())
    shard = images.select(torch.tensor(context.shard(len(images)), dtype=torch.int64))
    x = to_float(shard.images.to(context.device))
    y = shard.labels.to(context.device)
    return evaluate_shard(model, x, y, attacks, len(images), batch_size=batch_size, seed=seed, context=context)


def evaluate_shard(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, EvaluationAttack],
    count: int,
    *,
    batch_size: int,
    seed: int,
    context: Context,
) -> Evaluation:
    """Attack the shard of this rank, x (N, ...) and y (N,), and return the evaluation of all `count` examples.

    All ranks call it and get the same evaluation.
    """
    indices = torch.tensor(context.shard(count), dtype=torch.int64)
    evaluation = evaluate(model, x, y, attacks, batch_size=batch_size, seed=seed, indices=indices)
    return Evaluation(evaluation.names, context.unshard_rows(evaluation.correct))


def columns_of(evaluation: Evaluation) -> dict[str, Tensor]:
    """The columns of the matrix of an evaluation, bool (n,) each, by name."""
    return {name: evaluation.correct[:, index] for index, name in enumerate(evaluation.names)}


def matrix_to_parquet(columns: Mapping[str, Tensor]) -> bytes:
    """A Parquet file with a row per example, in order: its index and, from bool (n,) each, the given columns."""
    first = next(iter(columns.values()))
    table = {"example": pa.array(range(len(first)))}
    for name, column in columns.items():
        table[name] = pa.array(column.numpy())
    return to_parquet(pa.table(table))
