"""Check stored adversarial examples again: do they still fool the model, and are they feasible?

No number of the evaluation is used: images, labels and balls follow from its spec, the points from its store.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from poise.data.images.datasets import ImageSet, to_float
from poise.errors import UserError
from poise.kinds.common.attack_stages import bind, threat_names
from poise.kinds.common.finished_run import open_finished
from poise.kinds.common.target_model import TargetModel, open_target_model
from poise.kinds.robust_evaluate.chunks import AdversarialExamples, read_adversarial_examples
from poise.kinds.robust_evaluate.result import RecheckCounts, RecheckResult, RobustEvaluateResult
from poise.kinds.robust_evaluate.spec import RobustEvaluateSpec
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.robust.attacks import attack_mode
from poise.robust.attacks.base import scores
from poise.robust.attacks.losses import cw_loss
from poise.robust.threats import ORDERS, Threat
from poise.store.parquet import to_parquet
from poise.store.result import write_result
from poise.train.context import Context

__all__ = ["recheck"]

_TOLERANCE = 1e-5
"""Share of eps by which rounding may lengthen a perturbation."""


def recheck(spec: RobustEvaluateSpec, name: str, context: Context) -> None:
    """Check the adversarial examples of run `name` on rank 0; leave `artifacts/rechecked.parquet` and the result.

    Raises:
        UserError: no such run, one without a result or without adversarial examples, or one of another kind.
    """
    context.on_main(partial(_recheck, spec, name, context))


def _recheck(spec: RobustEvaluateSpec, name: str, context: Context) -> None:
    evaluated = open_finished(spec.store, name, RobustEvaluateSpec, RobustEvaluateResult)
    evaluated_spec = evaluated.spec
    if evaluated_spec.recheck is not None:
        raise UserError(f"recheck.run: {name!r} attacks nothing, it rechecks another run; name an evaluation")
    assert evaluated_spec.model is not None  # validated by its spec
    target = open_target_model(
        evaluated_spec.model,
        evaluated_spec.data,
        store=spec.store,
        seed=evaluated_spec.seed,
        device=context.device,
        split=evaluated_spec.split,
    )
    images = target.choose(evaluated_spec.num_examples)
    threats = _stage_threats(evaluated_spec, target)
    rows: list[dict[str, Any]] = []
    for adversarial in read_adversarial_examples(evaluated.run):
        done = len(rows) + len(adversarial.examples)
        context.report(Progress(spec.name, adversarial.stage, 0, 0, len(rows), done))
        rows += _check_examples(target, images, adversarial, threats[adversarial.stage], spec.batch_size, context)
    if not rows:
        raise UserError(f"recheck.run: {name!r} has kept no adversarial example: set keep_adversarial in its spec")
    warnings = _recheck_warnings(evaluated.result.weights_sha256, target, rows)
    _write_results(spec, rows, warnings, context)


def _stage_threats(spec: RobustEvaluateSpec, target: TargetModel) -> dict[str, list[Threat]]:
    """The balls of each stage, by the name of the stage."""
    by_column = {column: Threat(ball.norm, ball.eps) for ball, column in threat_names(spec.attacks).items()}
    threats: dict[str, list[Threat]] = {}
    for stage in bind(spec.attacks, target.num_classes):
        threats[stage.name] = [by_column[column] for column in stage.threats]
    return threats


def _check_examples(
    target: TargetModel,
    images: ImageSet,
    adversarial: AdversarialExamples,
    threats: list[Threat],
    batch_size: int,
    context: Context,
) -> Iterator[dict[str, Any]]:
    """A row for each example: whether it fools the model, by what margin, and how far it leaves ball and box."""
    x = to_float(images.images[adversarial.examples])  # (n, C, H, W)
    y = images.labels[adversarial.examples]  # (n,)
    logits = []
    with attack_mode(target.model):
        for batch in torch.split(adversarial.images, batch_size):
            logits.append(scores(target.model, batch.to(context.device)).cpu())
    losses = cw_loss(torch.cat(logits), y)  # (n,), above 0 where the model is fooled
    # An example is feasible if it lies in one of the balls of its stage.
    excess = torch.stack([_excess(threat, x, adversarial.images) for threat in threats]).amin(0)  # (n,)
    outside = (-adversarial.images).maximum(adversarial.images - 1).flatten(1).amax(1).clamp(min=0)  # (n,)
    columns = (adversarial.examples.tolist(), losses.tolist(), excess.tolist(), outside.tolist())
    for example, loss, example_excess, example_outside in zip(*columns, strict=True):
        yield {
            "stage": adversarial.stage,
            "example": example,
            "cw_loss": loss,
            "fools": loss > 0,
            "excess": example_excess,
            "outside": example_outside,
            "feasible": example_excess <= 0 and example_outside == 0,
        }


def _excess(threat: Threat, x: Tensor, points: Tensor) -> Tensor:
    """How much longer than eps a perturbation is, (N,), beyond what rounding to float32 explains; at most 0 inside."""
    delta = (points.double() - x.double()).flatten(1)  # (N, pixels)
    rounding = 2.0**-24 * (delta != 0)  # at most so much per changed pixel
    length = torch.linalg.vector_norm(delta, ord=ORDERS[threat.norm], dim=1)
    slack = torch.linalg.vector_norm(rounding, ord=ORDERS[threat.norm], dim=1)
    excess: Tensor = length - slack - threat.eps * (1 + _TOLERANCE)
    return excess


def _recheck_warnings(weights_sha256: str | None, target: TargetModel, rows: list[dict[str, Any]]) -> list[str]:
    """What has changed since the evaluation: the weights, points that no longer fool, points that are infeasible."""
    drifted = sum(not row["fools"] for row in rows)
    infeasible = sum(not row["feasible"] for row in rows)
    warnings = []
    if weights_sha256 != target.digest:
        warnings.append("the weights are not those of the evaluation")
    if drifted:
        warnings.append(f"{drifted} of {len(rows)} kept examples do not fool the model any more")
    if infeasible:
        warnings.append(f"{infeasible} of {len(rows)} kept examples leave their ball or the box")
    return warnings


def _write_results(spec: RobustEvaluateSpec, rows: list[dict[str, Any]], warnings: list[str], context: Context) -> None:
    """Write a row per example, and the result with counts per stage."""
    counts: dict[str, RecheckCounts] = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        stage_rows = [row for row in rows if row["stage"] == stage]
        counts[stage] = RecheckCounts(
            stored=len(stage_rows),
            fools=sum(row["fools"] for row in stage_rows),
            feasible=sum(row["feasible"] for row in stage_rows),
        )
    assert spec.recheck is not None  # or the run would be an evaluation
    result = RobustEvaluateResult(
        run=spec.name,
        seed=spec.seed,
        warnings=warnings,
        num_examples=len(rows),
        rechecked=RecheckResult(run=spec.recheck.run, stages=counts),
    )
    context.check_lease()
    context.run.append_events([event("warning", what=warning) for warning in warnings])
    context.run.write("artifacts/rechecked.parquet", to_parquet(pa.Table.from_pylist(rows)))
    write_result(context.run, result)
