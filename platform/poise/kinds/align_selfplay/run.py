"""`kind: align.selfplay`: a language model plays against itself under a preference oracle, measured in the exact game.

model, questions -> train.loop [sampler -> oracle -> advantage -> loss] -> policy over the answers of each question
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from poise.errors import PoiseError, UserError
from poise.inference.sampler import (
    Decoding,
    Request,
    Sampler,
)
from poise.inference.shards import check_questions, sample_all
from poise.kinds.align_selfplay.iterations import SelfPlay, snapshot_reference
from poise.kinds.align_selfplay.policy_evaluation import PolicyEvaluator, PolicyMetrics
from poise.kinds.align_selfplay.questions import GameQuestion, load_game_questions, response_text
from poise.kinds.align_selfplay.result import AlignSelfplayResult, PolicyResult
from poise.kinds.align_selfplay.spec import AlignSelfplaySpec
from poise.kinds.common.export import (
    export_model,
    next_token_probabilities,
    probe_sequences,
    rehearse_export,
)
from poise.kinds.common.language_evaluation import warn
from poise.models.language import fetch_folder, open_folder
from poise.models.model_folder import read_folder
from poise.models.sizes import count_parameters
from poise.models.special_tokens import reconcile
from poise.observe.rows import Rows
from poise.spec import SamplerSpec
from poise.spec.seeds import derive_seed
from poise.store.result import write_result
from poise.store.storage import scratch_folder
from poise.train.context import Context
from poise.train.loop import FitResult, fit
from poise.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["run"]


def run(spec: AlignSelfplaySpec, context: Context) -> None:
    """Train the policy by self-play; evaluate it before, during and after; leave the model and the result."""
    with ExitStack() as stack:
        # Model and questions.
        scratch = stack.enter_context(scratch_folder())
        folder = fetch_folder(spec.model, spec.store, scratch / "model")
        model, tokenizer = open_folder(folder)
        model.to(context.device)
        special = reconcile(model, tokenizer)
        warn(special.notes, context)
        questions = load_game_questions(spec, tokenizer)
        _check_requirements(folder, model, questions, spec.max_tokens)

        # Sampler, and what the end of the run will need.
        longest = max(len(question.tokens) for question in questions) + spec.max_tokens
        sampler = _open_sampler(spec.sampler.fit_sequences(longest), folder, context, stack)
        probes = probe_sequences([(*question.tokens, *question.answer_tokens[0]) for question in questions[:4]])
        rehearse_export(model, tokenizer, probes, context)

        # Self-play.
        evaluator = PolicyEvaluator(spec, model, questions, special.stop, context)
        if spec.method.num_proposals:
            proposals = context.on_main(partial(_draw_proposals, spec, questions, tokenizer, sampler, context))
            questions = [
                replace(question, proposals=texts) for question, texts in zip(questions, proposals, strict=True)
            ]
        oracle = spec.oracle.build({question.prompt: question.answers for question in questions})
        decode = partial(response_text, tokenizer)
        selfplay = SelfPlay(spec, model, questions, oracle, decode, sampler, context)
        fitted = fit(_task(spec, model, selfplay, evaluator), spec.train, context)

    # Evaluation and results.
    final = evaluator.measure()
    probabilities = next_token_probabilities(model, probes)
    context.on_main(partial(export_model, model, tokenizer, probes, probabilities, context))
    context.on_main(partial(_write_results, spec, model, evaluator, final, fitted, special.notes, context))


def _check_requirements(folder: Path, model: nn.Module, questions: Sequence[GameQuestion], max_tokens: int) -> None:
    """Check what the iterations will need: room after every prompt, and weights that the sampler knows by name.

    Raises:
        UserError: which of these is missing.
    """
    model_folder = read_folder(folder)
    prompts = ((question.prompt, question.tokens) for question in questions)
    check_questions(model_folder, prompts, max_tokens, "max_tokens")
    for question in questions:
        for answer in question.answer_tokens:
            model_folder.limits.check_ids(answer)
    try:
        model_folder.validate_state_dict(model.state_dict())
    except PoiseError as error:
        reason = "self-play sends new weights to its sampler under the names of the folder, and this model has others"
        cure = "open the model with transformers and save it again, or take one whose names stay the same"
        raise UserError(f"{reason} ({error}): {cure}") from error


def _open_sampler(spec: SamplerSpec, folder: Path, context: Context, stack: ExitStack) -> Sampler | None:
    """The sampler on rank 0, None on the other ranks; all ranks raise the error when it cannot be opened."""
    samplers: list[Sampler] = []

    def open_on_main() -> None:
        samplers.append(stack.enter_context(context.sampler(spec, folder)))

    context.on_main(open_on_main)
    return samplers[0] if samplers else None


def _draw_proposals(
    spec: AlignSelfplaySpec,
    questions: Sequence[GameQuestion],
    tokenizer: Tokenizer,
    sampler: Sampler | None,
    context: Context,
) -> list[tuple[str, ...]]:
    """Responses of the initial policy to each question, drawn once before the first step, committed in shards.

    Called on rank 0.
    """
    assert sampler is not None
    number = spec.method.num_proposals
    first_seed = derive_seed(spec.seed, "proposals") % 2**40
    requests = [
        Request(str(row), question.tokens, number, first_seed + row * number) for row, question in enumerate(questions)
    ]
    samples = sample_all(context, sampler, requests, Decoding(spec.max_tokens))
    return [tuple(response_text(tokenizer, sample) for sample in row) for row in samples]


def _task(spec: AlignSelfplaySpec, model: nn.Module, selfplay: SelfPlay, evaluator: PolicyEvaluator) -> Task:
    """The task of the training loop, whose epoch is an iteration."""
    steps_per_iteration = spec.method.inner_steps
    return Task(
        model=model,
        batch=lambda index: index,
        step=selfplay.step,
        state=snapshot_reference(model),
        batches_per_epoch=steps_per_iteration * spec.train.accumulate,
        # A response counts once, not in each of the inner steps that learn from it.
        examples_per_batch=spec.prompts * spec.rollouts / (spec.train.accumulate * steps_per_iteration),
        seed=spec.seed,
        evaluate=lambda: evaluator.measure().summary(),
        monitor="-exploitability",
        unit="responses",
    )


def _write_results(
    spec: AlignSelfplaySpec,
    model: nn.Module,
    evaluator: PolicyEvaluator,
    final: PolicyMetrics,
    fitted: FitResult,
    warnings: Sequence[str],
    context: Context,
) -> None:
    """On rank 0: write the policy on every question before and after, the metrics of the start, and the result."""
    result = AlignSelfplayResult(
        run=spec.name,
        seed=spec.seed,
        warnings=list(warnings),
        method=spec.method.name,
        oracle=spec.oracle.name,
        step=fitted.final_step,
        best_step=fitted.best_step,
        parameters=count_parameters(model),
        iterations=spec.iterations,
        num_questions=len(evaluator.questions),
        num_responses=spec.iterations * spec.prompts * spec.rollouts,
        equilibrium=evaluator.equilibrium.tolist(),
        start=_policy_result(evaluator.start),
        final=_policy_result(final),
    )
    rows = Rows()
    rows.add(0, 0.0, "validation", evaluator.start.summary())
    context.run.write("metrics/start.parquet", rows.to_parquet())
    context.run.write("artifacts/selfplay.json", json.dumps(evaluator.table(final), indent=1).encode())
    write_result(context.run, result)


def _policy_result(metrics: PolicyMetrics) -> PolicyResult:
    return PolicyResult(**metrics.summary(), policy=metrics.policies.mean(0).tolist())
