"""`kind: robust.evaluate`: any classifier under a list of attacks, from cheap to costly; every chunk is committed.

model, images -> clean -> for each stage: examples still correct under its threat -> chunks over the ranks -> matrix
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, nn

from poise.data.images.datasets import ImageSet, to_float
from poise.errors import PoiseError, UserError
from poise.kinds.common.attack_spec import BallSpec
from poise.kinds.common.attack_stages import BoundStage, bind, threat_names
from poise.kinds.common.target_model import TargetModel, open_target_model
from poise.kinds.common.user_model import explain_backward
from poise.kinds.robust_evaluate.chunks import ChunkEvaluator, ChunkResult
from poise.kinds.robust_evaluate.recheck import recheck
from poise.kinds.robust_evaluate.result import BallResult, RobustEvaluateResult
from poise.kinds.robust_evaluate.spec import RobustEvaluateSpec
from poise.kinds.robust_evaluate.stage_results import EvaluationResults
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.observe.rows import Rows
from poise.robust.attacks import AttackResult
from poise.robust.attacks.base import NO_GRADIENT, scores
from poise.robust.attacks.sanity_checks import RANDOMISED, gradient_masking, sanity_warnings
from poise.robust.noise import Noise
from poise.spec.seeds import derive_seed
from poise.stats import wilson
from poise.store.result import write_result
from poise.train.context import Context

__all__ = ["run"]


def run(spec: RobustEvaluateSpec, context: Context) -> None:
    """Attack the model, or recheck stored adversarial examples; leave `artifacts/evaluation.parquet` and the result."""
    if spec.recheck is not None:
        recheck(spec, spec.recheck.run, context)
        return

    # The model, the images, and the stages that attack them.
    assert spec.model is not None  # validated by the spec
    target = open_target_model(
        spec.model, spec.data, store=spec.store, seed=spec.seed, device=context.device, split=spec.split
    )
    digests = set(context.gather(target.digest))
    if len(digests) > 1:
        raise UserError("model: the workers have different weights; a function of yours has to return the same ones")
    images = target.choose(spec.num_examples)
    stages = bind(spec.attacks, target.num_classes, spec.batch_size)
    warning_texts = context.on_main(partial(_model_warnings, spec, target, images, context))

    # Each stage attacks the examples that are still classified correctly under its threat.
    seed = derive_seed(spec.seed, "evaluate")
    evaluator = ChunkEvaluator(target.model, target.digest, images, seed, spec.keep_adversarial, context)
    results = EvaluationResults(len(images))
    for stage in [_CLEAN, *stages]:
        chunk_results = _evaluate_stage(evaluator, stage, results.still_correct(stage), spec.batch_size)
        results.add(stage, chunk_results)

    warning_texts = [*warning_texts, *_masking_warnings(results)]
    context.on_main(partial(_write_results, spec, target, results, warning_texts, context))


def _classify(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
    """The stage without an attack: x (N, C, H, W) unchanged."""
    return AttackResult(x, scores(model, x).argmax(1) == y)


_CLEAN = BoundStage("clean", (), _classify, "the images as they are")


def _evaluate_stage(
    evaluator: ChunkEvaluator, stage: BoundStage, still_correct: Tensor, batch_size: int
) -> list[ChunkResult]:
    """The results of all chunks of a stage, on every rank; each rank evaluates every world_size-th chunk.

    The chunks follow from `still_correct` (n,) alone, so they are the same on any number of ranks and after a restart.

    Raises:
        PoiseError: the first error of any rank; on all ranks.
    """
    context = evaluator.context
    chunks = torch.split(still_correct.nonzero().flatten(), batch_size) if still_correct.any() else ()
    chunk_results: list[ChunkResult] = []
    failure: PoiseError | None = None
    try:
        for number in context.shard(len(chunks)):
            if context.is_main:
                done = len(chunk_results) * context.world_size
                context.report(Progress(context.run.name, stage.name, 0, 0, done, len(chunks), unit="chunks"))
            chunk_results.append(evaluator.evaluate_chunk(stage, number, chunks[number]))
    except PoiseError as error:
        failure = error  # raised below on every rank, because the others wait in `gather`
    by_rank = context.gather((chunk_results, failure))
    for _, rank_failure in by_rank:
        if rank_failure is not None:
            raise rank_failure
    return [chunk_result for rank_results, _ in by_rank for chunk_result in rank_results]


def _model_warnings(spec: RobustEvaluateSpec, target: TargetModel, images: ImageSet, context: Context) -> list[str]:
    """Reasons to distrust gradients of the model, from its behaviour on the first batch; also issued as warnings."""
    gradient_stages = [stage for stage in spec.attacks if stage.attack != "square"]
    losses = {_SANITY_LOSSES.get(getattr(stage, "loss", "ce"), "cw") for stage in gradient_stages}
    if target.num_classes < 3:
        losses.discard("dlr")  # the DLR loss needs three classes
    first = images.select(slice(spec.batch_size))
    x = to_float(first.images.to(context.device))
    y = first.labels.to(context.device)
    with explain_backward(target.model):
        messages = sanity_warnings(target.model, x, y, sorted(losses | {"cw"}))
    # Attacks that average over draws handle a randomised model, so it needs no warning.
    all_average_draws = all(getattr(stage, "draws", None) for stage in spec.attacks)
    if all_average_draws:
        messages = tuple(message for message in messages if not message.startswith(RANDOMISED))
    for message in messages:
        is_raised_later = message == NO_GRADIENT and gradient_stages  # by the attack itself, with the same message
        if context.is_main and not is_raised_later:
            warnings.warn(message, stacklevel=2)
    return list(messages)


_SANITY_LOSSES = {"ce": "ce", "dlr": "dlr"}
"""The loss of a stage -> the loss whose gradients are checked; every other loss is checked as "cw"."""


def _masking_warnings(results: EvaluationResults) -> list[str]:
    """Signs of gradient masking: examples that only Square fooled, after attacks with gradients on the same threat."""
    messages = list[str]()
    attacked_with_gradients = set[str]()
    for stage_result in results.stages:
        stage = stage_result.stage
        if not stage.black_box:
            attacked_with_gradients.add(stage.column)
        elif stage.column in attacked_with_gradients:
            message = gradient_masking(stage_result.attacked, stage_result.after)
            if message:
                messages.append(message)
    return messages


def _write_results(
    spec: RobustEvaluateSpec,
    target: TargetModel,
    results: EvaluationResults,
    warning_texts: list[str],
    context: Context,
) -> None:
    """On rank 0: write the matrix of all examples, the metrics and the result."""
    accuracy = results.accuracy()
    result = RobustEvaluateResult(
        run=spec.name,
        seed=spec.seed,
        warnings=warning_texts,
        model=_weights_source(spec, target),
        selected=target.weights,
        split=spec.split,
        num_examples=results.n,
        accuracy={target.weights: accuracy},
        intervals={name: wilson(share, results.n) for name, share in accuracy.items()},
        threats={name: _ball_result(ball) for ball, name in threat_names(spec.attacks).items()},
        stages=results.summaries(),
        weights_sha256=target.digest,
    )
    metrics = Rows()
    metrics.add(0, 0.0, "test", accuracy)
    timing = Rows()
    timing.add(0, 0.0, "timing", {f"stage/{part.stage.name}": part.seconds for part in results.stages})
    context.check_lease()
    context.run.append_events([event("warning", what=text) for text in warning_texts])
    context.run.write("artifacts/evaluation.parquet", results.matrix())
    context.run.write("metrics/test.parquet", metrics.to_parquet())
    context.run.write("metrics/timing.parquet", timing.to_parquet())
    write_result(context.run, result)


def _ball_result(ball: BallSpec) -> BallResult:
    return BallResult(norm=ball.norm, eps=float(ball.eps), words=str(ball))


def _weights_source(spec: RobustEvaluateSpec, target: TargetModel) -> str:
    """Where the attacked weights come from, for people."""
    assert spec.model is not None  # validated by the spec
    source = f"{spec.model.source} {getattr(spec.model, spec.model.source)}"
    if spec.model.run is not None:
        return f"{source}, {target.weights}"
    if spec.model.function is not None and spec.model.file is not None:
        source += f" with the weights of {spec.model.file}"
    return source if target.note is None else f"{source}, {target.note}"
