"""`kind: robust.evaluate`: any classifier under a list of attacks, from cheap to costly; every verdict is committed.

model, images -> clean -> for each stage: what stands under its threat -> chunks over the ranks -> verdicts -> matrix
"""

from __future__ import annotations

import json
import warnings
from functools import partial

import torch
from torch import Tensor, nn

from poise.data.sets import ImageSet, unit_pixels
from poise.errors import PoiseError, UserError
from poise.kinds.attacks import BoundStage, bind, threat_names
from poise.kinds.findings import Findings
from poise.kinds.reverify import reverify
from poise.kinds.specs.evaluation import RobustEvaluateSpec
from poise.kinds.subject import Subject, open_subject
from poise.kinds.user_model import explain_backward
from poise.kinds.verdicts import Court, Verdict
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.observe.rows import Rows
from poise.robust.attacks import AttackResult
from poise.robust.attacks.checks import RANDOMISED, masking, suspicions
from poise.robust.attacks.contract import NO_GRADIENT, scores
from poise.robust.noise import Noise
from poise.spec.seeds import derive_seed
from poise.stats import wilson
from poise.train.context import Context

__all__ = ["run"]


def run(spec: RobustEvaluateSpec, context: Context) -> None:
    """Attack, or judge again what was kept; leave `artifacts/evaluation.parquet` and `artifacts/summary.json`."""
    if spec.reverify is not None:
        reverify(spec, spec.reverify.run, context)
        return
    assert spec.model is not None  # the spec asks for it
    subject = open_subject(
        spec.model, spec.data, store=spec.store, seed=spec.seed, device=context.device, split=spec.split
    )
    if len(set(context.gather(subject.digest))) > 1:
        raise UserError("model: the workers have different weights; a function of yours has to return the same ones")
    images = subject.choose(spec.examples)
    seed = derive_seed(spec.seed, "evaluate")
    stages = bind(spec.attacks, subject.num_classes, spec.batch_size)
    signs = context.together(partial(_signs, spec, subject, images, context))
    court = Court(subject.model, subject.digest, images, seed, spec.keep_adversarial, context)
    findings = Findings(len(images))
    for stage in [_CLEAN, *stages]:
        findings.add(stage, _stage(court, stage, findings.standing(stage), spec.batch_size))
    doubts = [*signs, *_beaten(findings)]
    context.together(partial(_keep, spec, subject, findings, doubts, context))


def _clean(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
    return AttackResult(x, scores(model, x).argmax(1) == y)


_CLEAN = BoundStage("clean", (), _clean, "the images as they are")


def _stage(court: Court, stage: BoundStage, standing: Tensor, batch_size: int) -> list[Verdict]:
    """The verdicts on all chunks, on every rank; each rank takes every world_size-th chunk.

    Chunks follow from what stands alone, so that any number of ranks, killed at any time, comes to the same ones.
    """
    context = court.context
    chunks = torch.split(standing.nonzero().flatten(), batch_size) if standing.any() else ()
    mine = range(context.rank, len(chunks), context.world_size)
    found: list[Verdict] = []
    failure: PoiseError | None = None
    try:
        for number in mine:
            if context.leads:
                done = len(found) * context.world_size
                context.report(Progress(context.run.name, stage.name, 0, 0, done, len(chunks), unit="chunks"))
            found.append(court.verdict(stage, number, chunks[number]))
    except PoiseError as error:
        failure = error  # it is raised below, on every rank, so that none waits for ever
    parts = context.gather((found, failure))
    for _, failed in parts:
        if failed is not None:
            raise failed
    return [verdict for part, _ in parts for verdict in part]


def _signs(spec: RobustEvaluateSpec, subject: Subject, images: ImageSet, context: Context) -> list[str]:
    """What should make one doubt the result before it is there, seen on the first images."""
    losses = {_LOSSES.get(getattr(stage, "loss", "ce"), "margin") for stage in spec.attacks if stage.attack != "square"}
    if subject.num_classes < 3:
        losses.discard("dlr")
    first = images.select(slice(spec.batch_size))
    x, y = unit_pixels(first.images.to(context.device)), first.labels.to(context.device)
    with explain_backward(subject.model):
        signs = suspicions(subject.model, x, y, sorted(losses | {"margin"}))
    averaged = all(getattr(stage, "draws", None) for stage in spec.attacks)
    signs = tuple(sign for sign in signs if not (averaged and sign.startswith(RANDOMISED)))
    follows_gradients = any(stage.attack != "square" for stage in spec.attacks)
    for sign in signs:
        if context.leads and not (sign == NO_GRADIENT and follows_gradients):  # they refuse in the same words
            warnings.warn(sign, stacklevel=2)
    return list(signs)


_LOSSES = {"ce": "ce", "dlr": "dlr"}
"""What of the losses that a stage climbs is looked at by its name; all others are margins."""


def _beaten(findings: Findings) -> list[str]:
    """What only Square has fooled."""
    beaten, followed = list[str | None](), set[str]()
    for part in findings.stages:
        if not part.stage.black_box:
            followed.add(part.stage.column)
        elif part.stage.column in followed:
            beaten.append(masking(part.attacked, part.after))
    return [*filter(None, beaten)]


def _keep(spec: RobustEvaluateSpec, subject: Subject, findings: Findings, doubts: list[str], context: Context) -> None:
    """Write the matrix, the metrics, and what they say together."""
    accuracy = findings.accuracy()
    summary = {
        "run": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "model": _source(spec, subject),
        "selected": subject.weights,
        "split": spec.split,
        "examples": findings.n,
        "accuracy": {subject.weights: accuracy},
        "intervals": {name: wilson(share, findings.n) for name, share in accuracy.items()},
        "threats": {name: str(ball) for ball, name in threat_names(spec.attacks).items()},
        "stages": findings.told(),
        "warnings": doubts,
        "weights_sha256": subject.digest,
    }
    metrics, timing = Rows(), Rows()
    metrics.add(0, 0.0, "test", accuracy)
    seconds = {f"stage/{p.stage.name}": sum(v.seconds for v in p.verdicts) for p in findings.stages}
    timing.add(0, 0.0, "timing", seconds)
    context.guard()
    context.run.append_events([event("warning", what=doubt) for doubt in doubts])
    context.run.write("artifacts/evaluation.parquet", findings.matrix())
    context.run.write("metrics/test.parquet", metrics.to_parquet())
    context.run.write("metrics/timing.parquet", timing.to_parquet())
    context.run.write("artifacts/summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())


def _source(spec: RobustEvaluateSpec, subject: Subject) -> str:
    assert spec.model is not None  # the spec asks for it
    source = f"{spec.model.source} {getattr(spec.model, spec.model.source)}"
    if spec.model.run is not None:
        return f"{source}, {subject.weights}"
    if spec.model.function is not None and spec.model.file is not None:
        source += f" with the weights of {spec.model.file}"
    return source if subject.note is None else f"{source}, {subject.note}"
