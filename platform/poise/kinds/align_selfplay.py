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

from poise.align.oracles import MatrixOracle
from poise.align.spec import NashRs
from poise.data.examples import Question, answer_after, encode_completion, encode_prompt
from poise.data.questions import load_questions
from poise.errors import PoiseError, UserError
from poise.kinds.exported import keep_model, next_token_probabilities, probe_sequences, rehearse_export
from poise.kinds.language import warn
from poise.kinds.sampling import check_questions, sample_all
from poise.kinds.selfplay import Asked, SelfPlay, magnet_of
from poise.kinds.specs.align import AlignSelfplaySpec
from poise.kinds.standing import Measured, Standing
from poise.models.folder import read_folder
from poise.models.language import fetch_folder, open_folder
from poise.models.sampling import Decoding, Request, Sample, Sampler
from poise.models.special_tokens import reconcile
from poise.observe.rows import Rows
from poise.spec import SamplerSpec
from poise.spec.seeds import derive_seed
from poise.store.storage import scratch_folder
from poise.train.context import Context
from poise.train.loop import Fitted, fit
from poise.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["run"]


def run(spec: AlignSelfplaySpec, context: Context) -> None:
    """Play, and measure the policy before, meanwhile and after."""
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        folder = fetch_folder(spec.model, spec.store, scratch / "model")
        model, tokenizer = open_folder(folder)
        model.to(context.device)
        special = reconcile(model, tokenizer)
        warn(special.notes, context)
        asked = _asked(spec, tokenizer)
        _check_fit(folder, model, asked, spec.max_tokens)
        longest = max(len(question.tokens) for question in asked) + spec.max_tokens
        sampler = _sampler(spec.sampler.fit_sequences(longest), folder, context, stack)
        probes = probe_sequences([(*question.tokens, *question.answer_tokens[0]) for question in asked[:4]])
        rehearse_export(model, tokenizer, probes, context)
        standing = Standing(spec, model, asked, special.stop, context)
        if isinstance(spec.method, NashRs):
            texts = context.together(lambda: _proposals(spec, asked, tokenizer, sampler, context))
            asked = [replace(question, proposals=given) for question, given in zip(asked, texts, strict=True)]
        oracle = MatrixOracle(spec.oracle.rows, {question.prompt: question.answers for question in asked})
        play = SelfPlay(spec, model, asked, oracle, partial(_text, tokenizer), sampler, context)
        fitted = fit(_task(spec, model, play, standing), spec.train, context)
    final = standing.measure()
    trained = next_token_probabilities(model, probes)
    context.together(partial(keep_model, model, tokenizer, probes, trained, context))
    context.together(partial(_keep, spec, model, standing, final, fitted, special.notes, context))


def _check_fit(folder: Path, model: nn.Module, asked: Sequence[Asked], max_tokens: int) -> None:
    """What the iterations will need: room behind every prompt, and weights that the sampler knows by their names."""
    stored = read_folder(folder)
    check_questions(stored, ((question.prompt, question.tokens) for question in asked), max_tokens, "max_tokens")
    for question in asked:
        for answer in question.answer_tokens:
            stored.limits.check_ids(answer)
    try:
        stored.checked(model.state_dict())
    except PoiseError as error:
        reason = "self-play sends new weights to its sampler under the names of the folder, and this model has others"
        cure = "open the model with transformers and save it again, or take one whose names stay the same"
        raise UserError(f"{reason} ({error}): {cure}") from error


def _task(spec: AlignSelfplaySpec, model: nn.Module, play: SelfPlay, standing: Standing) -> Task:
    return Task(
        model=model,
        batch=lambda index: index,
        step=play.step,
        state=magnet_of(model),
        batches_per_epoch=spec.method.inner_steps * spec.train.accumulate,
        # A response counts once, not in each of the inner steps that learn from it.
        examples_per_batch=spec.prompts * spec.rollouts / (spec.train.accumulate * spec.method.inner_steps),
        seed=spec.seed,
        evaluate=lambda: standing.measure().summary(),
        monitor="-exploitability",
        unit="responses",
    )


def _asked(spec: AlignSelfplaySpec, tokenizer: Tokenizer) -> list[Asked]:
    """The questions with the answers that the oracle ranks: the first of each, in a world the likeliest."""
    questions = load_questions(spec.questions, spec.seed)
    if len(questions) < spec.prompts:
        raise UserError(f"prompts: {spec.prompts} per iteration are more than the {len(questions)} questions")
    return [_one_asked(spec, question, tokenizer) for question in questions]


def _one_asked(spec: AlignSelfplaySpec, question: Question, tokenizer: Tokenizer) -> Asked:
    number = len(spec.oracle.rows)
    answers = tuple(dict.fromkeys(question.distribution or question.answers))[:number]
    if len(answers) < number:
        raise UserError(f"question {question.id!r} has {len(answers)} answers and the oracle ranks {number}")
    tokens = tuple(
        encode_completion(tokenizer, answer_after(question.prompt, answer), question.prompt) for answer in answers
    )
    for answer, written in zip(answers, tokens, strict=True):
        said = str(tokenizer.decode(list(written[:-1]))).strip()  # as `_text` reads a response
        if said != answer:
            raise UserError(
                f"question {question.id!r}: the tokenizer of this model writes the answer {answer!r} as {said!r}, so "
                "that no response is ever that answer; list it as the model writes it"
            )
    if (longest := max(map(len, tokens))) > spec.max_tokens:
        raise UserError(f"max_tokens: question {question.id!r} has an answer of {longest} tokens, EOS included")
    return Asked(question.prompt, encode_prompt(tokenizer, question.prompt), answers, tokens)


def _sampler(spec: SamplerSpec, folder: Path, context: Context, stack: ExitStack) -> Sampler | None:
    """The sampler of rank 0; None on the others, which learn of it when it cannot be opened."""
    opened: list[Sampler] = []

    def open_here() -> None:
        opened.append(stack.enter_context(context.sampler(spec, folder)))

    context.together(open_here)
    return opened[0] if opened else None


def _proposals(
    spec: AlignSelfplaySpec, asked: Sequence[Asked], tokenizer: Tokenizer, sampler: Sampler | None, context: Context
) -> list[tuple[str, ...]]:
    """Rank 0, before the first step: what the reference answers, drawn once for the run and committed in shards."""
    assert sampler is not None
    assert isinstance(spec.method, NashRs)
    number, first = spec.method.proposals, derive_seed(spec.seed, "proposals") % 2**40
    requests = [Request(str(row), one.tokens, number, first + row * number) for row, one in enumerate(asked)]
    drawn = sample_all(context, sampler, requests, Decoding(spec.max_tokens))
    return [tuple(_text(tokenizer, sample) for sample in samples) for samples in drawn]


def _text(tokenizer: Tokenizer, sample: Sample) -> str:
    """What was said; special tokens are kept and a cut is marked, so that neither passes for a listed answer."""
    if sample.finish == "stop":
        return str(tokenizer.decode(list(sample.tokens[:-1]))).strip()
    return f"{tokenizer.decode(list(sample.tokens))} [cut]"


def _keep(
    spec: AlignSelfplaySpec,
    model: nn.Module,
    standing: Standing,
    final: Measured,
    fitted: Fitted,
    warnings: Sequence[str],
    context: Context,
) -> None:
    """Rank 0: the standing of every question before and after, the summary, and the row of the beginning."""
    told = {
        "run": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "method": spec.method.name,
        "oracle": spec.oracle.name,
        "step": fitted.final_step,
        "best_step": fitted.best_step,
        "iterations": spec.iterations,
        "questions": len(standing.asked),
        "responses": spec.iterations * spec.prompts * spec.rollouts,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "equilibrium": standing.equilibrium.tolist(),
        "warnings": list(warnings),
        "start": standing.start.summary() | {"policy": standing.start.policies.mean(0).tolist()},
        "final": final.summary() | {"policy": final.policies.mean(0).tolist()},
    }
    rows = Rows()
    rows.add(0, 0.0, "validation", standing.start.summary())
    context.run.write("metrics/start.parquet", rows.to_parquet())
    context.run.write("artifacts/selfplay.json", json.dumps(standing.table(final), indent=1).encode())
    context.run.write("artifacts/summary.json", json.dumps(told, indent=1).encode())
