"""Adversarial examples that were kept, judged again: do they still fool the model, and are they feasible?

Nothing of the evaluation is believed: images, labels and balls come from its spec, the points from its store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from poise.data.sets import ImageSet, unit_pixels
from poise.errors import UserError
from poise.kinds.attacks import bind, threat_names
from poise.kinds.specs.evaluation import RobustEvaluateSpec
from poise.kinds.subject import Subject, open_subject
from poise.kinds.verdicts import Kept, kept_examples
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.robust.attacks import attack_mode
from poise.robust.attacks.contract import scores
from poise.robust.attacks.losses import margin
from poise.robust.threats import ORDERS, Threat
from poise.store.runs import Run, open_run
from poise.train.context import Context

__all__ = ["reverify"]

_TOLERANCE = 1e-5
"""Share of eps that rounding may add to a length; papers/adversarial.md, section 9."""


def reverify(spec: RobustEvaluateSpec, name: str, context: Context) -> None:
    """Leave `artifacts/reverified.parquet`, a row per kept example, and `artifacts/summary.json`. One rank does it."""
    context.together(partial(_reverify, spec, name, context))


def _reverify(spec: RobustEvaluateSpec, name: str, context: Context) -> None:
    run = open_run(spec.store, name, must_exist=True)
    was = _spec_of(run)
    try:
        then = json.loads(run.read("artifacts/summary.json"))["weights_sha256"]
    except FileNotFoundError:
        raise UserError(f"reverify.run: {name!r} in {run.storage.url} has no result yet: run it to its end") from None
    assert was.model is not None  # an evaluation has one
    subject = open_subject(was.model, was.data, store=spec.store, seed=was.seed, device=context.device, split=was.split)
    images, balls = subject.choose(was.examples), _balls(was, subject)
    rows: list[dict[str, Any]] = []
    for kept in kept_examples(run):
        context.report(Progress(spec.name, kept.stage, 0, 0, len(rows), len(rows) + len(kept.examples)))
        rows += _judged(subject, images, kept, balls[kept.stage], spec.batch_size, context)
    if not rows:
        raise UserError(f"reverify.run: {name!r} has kept no adversarial example: set keep_adversarial in its spec")
    _keep(spec, rows, _doubts(then, subject, rows), context)


def _spec_of(run: Run) -> RobustEvaluateSpec:
    tree = yaml.safe_load(run.read("spec.yaml"))
    if tree.get("kind") != "robust.evaluate" or tree.get("reverify"):
        raise UserError(f"reverify.run: {run.name!r} is a {tree.get('kind')} that attacks nothing; name an evaluation")
    return RobustEvaluateSpec.model_validate(tree)


def _balls(was: RobustEvaluateSpec, subject: Subject) -> dict[str, list[Threat]]:
    """The balls of each stage."""
    named = {name: Threat(ball.norm, ball.eps) for ball, name in threat_names(was.attacks).items()}
    return {stage.name: [named[name] for name in stage.threats] for stage in bind(was.attacks, subject.num_classes)}


def _judged(
    subject: Subject, images: ImageSet, kept: Kept, balls: list[Threat], batch_size: int, context: Context
) -> Iterator[dict[str, Any]]:
    """A row for each example: whether it fools the model, by what margin, and how far it leaves ball and box."""
    x, y = unit_pixels(images.images[kept.examples]), images.labels[kept.examples]
    with attack_mode(subject.model):
        logits = [scores(subject.model, part.to(context.device)).cpu() for part in torch.split(kept.images, batch_size)]
    margins = margin(torch.cat(logits), y)
    excess = torch.stack([_excess(ball, x, kept.images) for ball in balls]).amin(0)
    outside = (-kept.images).maximum(kept.images - 1).flatten(1).amax(1).clamp(min=0)
    columns = (kept.examples, margins, excess, outside)
    for example, gap, over, out in zip(*(column.tolist() for column in columns), strict=True):
        feasible = over <= 0 and out == 0
        yield {"stage": kept.stage, "example": example, "margin": gap, "fools": gap > 0, "excess": over,
               "outside": out, "feasible": feasible}  # fmt: skip


def _excess(ball: Threat, x: Tensor, points: Tensor) -> Tensor:
    """How much longer than eps (N,) a perturbation is, beyond what rounding to float32 explains; at most 0 inside."""
    delta = (points.double() - x.double()).flatten(1)
    rounding = 2.0**-24 * (delta != 0)
    length, slack = (torch.linalg.vector_norm(v, ord=ORDERS[ball.norm], dim=1) for v in (delta, rounding))
    excess: Tensor = length - slack - ball.eps * (1 + _TOLERANCE)
    return excess


def _doubts(then: str, subject: Subject, rows: list[dict[str, Any]]) -> list[str]:
    """Drift in words: other weights than `then`, points that fool no more, points that are not feasible."""
    drifted, infeasible = (sum(not row[key] for row in rows) for key in ("fools", "feasible"))
    found = {
        "the weights are not those of the evaluation": then != subject.digest,
        f"{drifted} of {len(rows)} kept examples do not fool the model any more": drifted,
        f"{infeasible} of {len(rows)} kept examples leave their ball or the box": infeasible,
    }
    return [words for words, wrong in found.items() if wrong]


def _keep(spec: RobustEvaluateSpec, rows: list[dict[str, Any]], doubts: list[str], context: Context) -> None:
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    counts = {
        stage: {"kept": sum(row["stage"] == stage for row in rows)}
        | {key: sum(row[key] for row in rows if row["stage"] == stage) for key in ("fools", "feasible")}
        for stage in stages
    }
    summary = {
        "run": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "examples": len(rows),
        "reverified": {"run": spec.reverify and spec.reverify.run, "stages": counts},
        "warnings": doubts,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    context.guard()
    context.run.append_events([event("warning", what=doubt) for doubt in doubts])
    context.run.write("artifacts/reverified.parquet", bytes(sink.getvalue()))
    context.run.write("artifacts/summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
