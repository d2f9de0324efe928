"""`kind: calibrate.measure`: ask a language model each question many times and measure its calibration.

questions -> samples, in committed shards -> answers -> classes of equal meaning, graded -> a row per question -> errors

Everything after the samples is a pure function of them, so measuring again draws no new samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from poise.data.text.examples import Question, encode_prompts
from poise.data.text.questions import load_questions
from poise.errors import UserError
from poise.inference.sampler import Decoding, Request, Sample
from poise.inference.shards import check_questions, sample_all
from poise.kinds.calibrate_measure.confidence import (
    SCHEMA,
    QuestionResult,
    describe_protocol,
    score_question,
    summarize,
)
from poise.kinds.calibrate_measure.result import CalibrateMeasureResult
from poise.kinds.calibrate_measure.spec import CalibrateMeasureSpec
from poise.kinds.common.language_evaluation import warn
from poise.models.language import fetch_folder, open_tokenizer
from poise.models.model_folder import read_folder
from poise.models.special_tokens import SpecialTokens
from poise.observe.rows import Rows
from poise.spec.seeds import derive_seed
from poise.store.parquet import to_parquet
from poise.store.result import write_result
from poise.store.storage import scratch_folder
from poise.train.context import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["run"]


def run(spec: CalibrateMeasureSpec, context: Context) -> None:
    """Sample answers and measure calibration on rank 0; leave `artifacts/questions.parquet` and the result."""
    context.on_main(partial(_measure, spec, context))


def _measure(spec: CalibrateMeasureSpec, context: Context) -> None:
    questions = load_questions(spec.questions, spec.seed)
    if not questions:
        raise UserError("questions: there is none to ask")

    # Samples, in committed shards.
    with scratch_folder() as scratch:
        folder = fetch_folder(spec.model, spec.store, scratch / "model")
        tokenizer = open_tokenizer(folder)
        model_folder = read_folder(folder)
        special = model_folder.special
        requests = _requests(spec, questions, tokenizer)
        prompts = [(request.id, request.prompt) for request in requests]
        check_questions(model_folder, prompts, spec.decoding.max_tokens, "decoding.max_tokens")
        longest = max(len(request.prompt) for request in requests) + spec.decoding.max_tokens
        warn(special.notes, context)
        with context.sampler(spec.sampler.fit_sequences(longest), folder) as sampler:
            samples = sample_all(context, sampler, requests, _decoding(spec))

    # Answers, classes of equal meaning, grades and confidences.
    exact = _has_exact_probabilities(spec, special)
    rows = []
    for question, question_samples in zip(questions, samples, strict=True):
        texts = [_response_text(sample, tokenizer, spec.decoding.stop) for sample in question_samples]
        rows.append(score_question(question, question_samples, texts, spec.answer, spec.clustering, exact=exact))
    num_tokens = sum(sample.num_tokens for question_samples in samples for sample in question_samples)
    _write_results(spec, rows, num_tokens, special.notes, context)


def _requests(spec: CalibrateMeasureSpec, questions: Sequence[Question], tokenizer: Tokenizer) -> list[Request]:
    """One request per question. Each takes `samples` seeds in a row, so no two samples share a seed."""
    first_seed = derive_seed(spec.seed, "samples") % 2**40
    prompts = encode_prompts(tokenizer, [spec.prompt.replace("{question}", question.prompt) for question in questions])
    requests = []
    for index, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        requests.append(Request(question.id, prompt, spec.samples, first_seed + index * spec.samples))
    return requests


def _decoding(spec: CalibrateMeasureSpec) -> Decoding:
    decoding = spec.decoding
    return Decoding(decoding.max_tokens, float(decoding.temperature), float(decoding.top_p), tuple(decoding.stop))


def _has_exact_probabilities(spec: CalibrateMeasureSpec, special: SpecialTokens) -> bool:
    """Whether the log-probabilities of a sample give the probability of its response.

    They do if the samples are drawn from the model's own distribution and one token ends a response. With several such
    tokens, the samples do not say how likely each of them was.
    """
    is_own_distribution = _decoding(spec) == Decoding(spec.decoding.max_tokens)
    return is_own_distribution and len(special.stop) == 1


def _response_text(sample: Sample, tokenizer: Tokenizer, stop: Sequence[str]) -> str:
    """The decoded response before the stop token or the stop string."""
    tokens = sample.tokens[:-1] if sample.finish == "stop" else sample.tokens
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    if sample.finish != "stop_string":
        return text
    # A stop string that is not in the text begins with a space that the tokenizer drops at the start of a text: the
    # response before it is empty.
    return text[: min((text.index(string) for string in stop if string in text), default=0)]


def _write_results(
    spec: CalibrateMeasureSpec,
    rows: Sequence[QuestionResult],
    num_tokens: int,
    warnings: Sequence[str],
    context: Context,
) -> None:
    """Write a row per question, the metrics, and the result."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA)
    summary = summarize(rows, bins=spec.bins, reps=spec.bootstrap)
    result = CalibrateMeasureResult(
        run=spec.name,
        seed=spec.seed,
        num_examples=len(rows),
        tokens=num_tokens,
        protocol=describe_protocol(spec),
        **{**summary, "warnings": [*warnings, *summary["warnings"]]},
    )
    metrics = Rows()
    defined = {name: value for name, (value, _, _) in result.metrics.items() if value is not None}
    metrics.add(0, 0.0, "test", defined)
    context.check_lease()
    context.run.write("artifacts/questions.parquet", to_parquet(table))
    context.run.write("metrics/test.parquet", metrics.to_parquet())
    write_result(context.run, result)
