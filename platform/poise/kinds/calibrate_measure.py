"""`kind: calibrate.measure`: ask a language model each question many times; is it as often right as it is confident?

questions -> samples, in committed shards -> answers -> classes of equal meaning, graded -> a row per question -> errors

Everything after the samples is a pure function of them: measuring again draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from poise.data.examples import Question, encode_prompt
from poise.data.questions import load_questions
from poise.errors import UserError
from poise.kinds.confidence import SCHEMA, Asked, asked, described, summarised
from poise.kinds.language import warn
from poise.kinds.sampling import check_questions, sample_all
from poise.kinds.specs.calibrate import CalibrateMeasureSpec
from poise.models.folder import read_folder
from poise.models.language import fetch_folder, open_tokenizer
from poise.models.sampling import Decoding, Request, Sample
from poise.models.special_tokens import SpecialTokens
from poise.observe.rows import Rows
from poise.spec.seeds import derive_seed
from poise.store.storage import scratch_folder
from poise.train.context import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["run"]


def run(spec: CalibrateMeasureSpec, context: Context) -> None:
    """Sample, measure, and leave `artifacts/questions.parquet` and `artifacts/summary.json`."""
    context.together(partial(_measure, spec, context))


def _measure(spec: CalibrateMeasureSpec, context: Context) -> None:
    questions = load_questions(spec.questions, spec.seed)
    if not questions:
        raise UserError("questions: there is none to ask")
    with scratch_folder() as scratch:
        folder = fetch_folder(spec.model, spec.store, scratch / "model")
        tokenizer, stored = open_tokenizer(folder), read_folder(folder)
        special, requests = stored.special, _requests(spec, questions, tokenizer)
        prompts = [request.prompt for request in requests]
        named = [(request.id, request.prompt) for request in requests]
        check_questions(stored, named, spec.decoding.max_tokens, "decoding.max_tokens")
        sampler_spec = spec.sampler.fit_sequences(max(map(len, prompts)) + spec.decoding.max_tokens)
        warn(special.notes, context)
        with context.sampler(sampler_spec, folder) as sampler:
            samples = sample_all(context, sampler, requests, _decoding(spec))
    exact = _is_exact(spec, special)
    rows = [
        _asked(spec, question, drawn, tokenizer, exact=exact)
        for question, drawn in zip(questions, samples, strict=True)
    ]
    tokens = sum(sample.num_tokens for drawn in samples for sample in drawn)
    _keep(spec, rows, tokens, special.notes, context)


def _requests(spec: CalibrateMeasureSpec, questions: Sequence[Question], tokenizer: Tokenizer) -> list[Request]:
    """One request per question; their seeds lie as far apart as each draws samples."""
    first = derive_seed(spec.seed, "samples") % 2**40
    return [
        Request(
            question.id,
            encode_prompt(tokenizer, spec.prompt.replace("{question}", question.prompt)),
            spec.samples,
            first + index * spec.samples,
        )
        for index, question in enumerate(questions)
    ]


def _decoding(spec: CalibrateMeasureSpec) -> Decoding:
    decoding = spec.decoding
    return Decoding(decoding.max_tokens, float(decoding.temperature), float(decoding.top_p), tuple(decoding.stop))


def _is_exact(spec: CalibrateMeasureSpec, special: SpecialTokens) -> bool:
    """Whether the probability of an answer is that of the response: the model's own distribution is drawn from, and one
    token ends it. With several, the samples do not say how likely each of them was."""
    return _decoding(spec) == Decoding(spec.decoding.max_tokens) and len(special.stop) == 1


def _asked(
    spec: CalibrateMeasureSpec, question: Question, samples: Sequence[Sample], tokenizer: Tokenizer, *, exact: bool
) -> Asked:
    texts = [_text(sample, tokenizer, spec.decoding.stop) for sample in samples]
    return asked(question, samples, texts, spec.answer, exact=exact)


def _text(sample: Sample, tokenizer: Tokenizer, stop: Sequence[str]) -> str:
    """What was said before the stop token or the stop string."""
    said = sample.tokens[:-1] if sample.finish == "stop" else sample.tokens
    text = str(tokenizer.decode(list(said), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    if sample.finish != "stop_string":
        return text
    # A string that is not found begins with the space that some tokenizers drop at the start: nothing was said before.
    return text[: min((text.index(string) for string in stop if string in text), default=0)]


def _keep(
    spec: CalibrateMeasureSpec, rows: Sequence[Asked], tokens: int, warnings: Sequence[str], context: Context
) -> None:
    """Write the row of each question, and what they say together."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA), sink, compression="zstd")
    told = summarised(rows, bins=spec.bins, reps=spec.bootstrap)
    head = {"run": spec.name, "kind": spec.kind, "seed": spec.seed, "examples": len(rows), "tokens": tokens}
    head["protocol"] = described(spec)
    told["warnings"] = [*warnings, *told["warnings"]]
    metrics = Rows()
    known = {name: found[0] for name, found in told["metrics"].items() if found[0] is not None}
    metrics.add(0, 0.0, "test", known)
    context.guard()
    context.run.write("artifacts/questions.parquet", bytes(sink.getvalue()))
    context.run.write("metrics/test.parquet", metrics.to_parquet())
    context.run.write("artifacts/summary.json", json.dumps({**head, **told}, indent=1, allow_nan=False).encode())
