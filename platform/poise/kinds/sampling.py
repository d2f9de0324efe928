"""Samples of many requests, committed in shards: what was drawn is in the store and is never drawn again.

A shard is `samples/shard-00000.parquet` of the run, a row per sample. Its metadata holds a fingerprint of the requests
and the decoding that it answers, so that a shard is never taken for the answer to something else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from poise.errors import DamagedError, UserError
from poise.models.sampling import Decoding, ProgressCallback, Request, Sample, Sampler
from poise.observe.progress import Progress
from poise.store.runs import Run
from poise.train.context import Context

if TYPE_CHECKING:
    from poise.models.folder import ModelFolder

__all__ = ["check_questions", "sample_all"]

_SCHEMA = pa.schema(
    {
        "request": pa.string(),
        "index": pa.int32(),
        "tokens": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float64()),
        "finish": pa.string(),
        "version": pa.int64(),
    }
)


def check_questions(
    folder: ModelFolder, prompts: Iterable[tuple[str, Sequence[int]]], max_tokens: int, key: str
) -> None:
    """UserError that names the first question, by id or text, after whose prompt `max_tokens` more do not fit.

    `key` is where the spec says how many.
    """
    for question, prompt in prompts:
        try:
            folder.check_room([prompt], max_tokens, key)
        except UserError as error:
            raise UserError(f"question {question[:60]!r}: {error}") from error


def sample_all(
    context: Context, sampler: Sampler, requests: Sequence[Request], decoding: Decoding, shard_size: int = 256
) -> list[list[Sample]]:
    """The samples of each request, in order; of `shard_size` requests at a time. One rank calls it.

    A shard that the run has is read. UserError when it answers other requests, DamagedError when it cannot be read.
    """
    answers: list[list[Sample]] = []

    def report(before: int, answered: int) -> None:
        context.report(_progress(context.run.name, before + answered, len(requests)))

    for number, start in enumerate(range(0, len(requests), shard_size)):
        share = requests[start : start + shard_size]
        known = _read(context.run, number, share, decoding)
        if known is None:
            known = _draw(context, sampler, number, share, decoding, partial(report, start))
        answers += known
        report(start, len(share))
    return answers


def _progress(run: str, answered: int, total: int) -> Progress:
    return Progress(run, "sample", answered / total, 1.0, answered, total, unit="requests")


def _draw(
    context: Context,
    sampler: Sampler,
    number: int,
    requests: Sequence[Request],
    decoding: Decoding,
    on_progress: ProgressCallback,
) -> list[list[Sample]]:
    started = time.monotonic()
    answers = sampler.generate(requests, decoding, on_progress)
    seconds = time.monotonic() - started
    samples = [sample for answer in answers for sample in answer]
    tokens = sum(sample.num_tokens for sample in samples)
    cost = {"seconds": round(seconds, 3), "samples": len(samples), "tokens": tokens}
    cost["prompt_tokens"] = sum(len(request.prompt) for request in requests)
    context.guard()
    context.run.write(_name(number), _encoded(samples, {"fingerprint": _fingerprint(requests, decoding), **cost}))
    context.sink.inc("poise_samples_total", len(samples), run=context.run.name)
    context.sink.inc("poise_sampled_tokens_total", tokens, run=context.run.name)
    return answers


def _read(run: Run, number: int, requests: Sequence[Request], decoding: Decoding) -> list[list[Sample]] | None:
    try:
        data = run.read(_name(number))
    except FileNotFoundError:
        return None
    path = f"{run.url}/{_name(number)}"
    try:
        table = pq.read_table(pa.BufferReader(data)).cast(_SCHEMA)
        told = json.loads(pq.read_metadata(pa.BufferReader(data)).metadata[b"poise"])
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise DamagedError(f"{path} is damaged ({error}): remove that one file and run again") from error
    if told["fingerprint"] != _fingerprint(requests, decoding):
        raise UserError(
            f"{path} answers other prompts, seeds or decoding than are asked for now; choose another name for the run"
        )
    samples = iter(_decoded(table))
    return [[next(samples) for _ in range(request.n)] for request in requests]


def _decoded(table: pa.Table) -> Iterator[Sample]:
    """The sample of each row; no token becomes a Python object."""
    for batch in table.to_batches():
        columns = {name: batch.column(name) for name in ("request", "index", "finish", "version")}
        plain = zip(*(column.to_pylist() for column in columns.values()), strict=True)
        tokens, logprobs = batch.column("tokens"), batch.column("logprobs")
        for row, (request, index, finish, version) in enumerate(plain):
            drawn = tokens[row].values.to_numpy(), logprobs[row].values.to_numpy()
            yield Sample(request, index, *drawn, finish, version)


def _encoded(samples: Sequence[Sample], told: dict[str, Any]) -> bytes:
    """A Parquet file with a row per sample. The tokens of all are one buffer, and so are their log-probabilities."""
    ends = np.cumsum([0, *(sample.num_tokens for sample in samples)], dtype=np.int32)
    tokens = np.frombuffer(b"".join(sample.token_bytes for sample in samples), dtype=np.int32)
    logprobs = np.frombuffer(b"".join(sample.logprob_bytes for sample in samples), dtype=np.float64)
    columns = {
        "request": [sample.request for sample in samples],
        "index": [sample.index for sample in samples],
        "tokens": pa.ListArray.from_arrays(ends, tokens),
        "logprobs": pa.ListArray.from_arrays(ends, logprobs),
        "finish": [sample.finish for sample in samples],
        "version": [sample.version for sample in samples],
    }
    table = pa.table(columns, schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"poise": json.dumps(told)}), sink, compression="zstd")
    return bytes(sink.getvalue())


def _fingerprint(requests: Sequence[Request], decoding: Decoding) -> str:
    """The SHA-256 of all that decides what is drawn, the weights aside: these are the run's own."""
    asked = [asdict(decoding), *(asdict(request) for request in requests)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _name(number: int) -> str:
    return f"samples/shard-{number:05}.parquet"
