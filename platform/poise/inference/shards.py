"""Samples of many requests, committed to the store in shards and read from there when a run is resumed.

A shard is the chunk `samples/shard-00000.parquet` of the run (see `poise.store.chunks`), with one row per sample.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from poise.errors import UserError
from poise.inference.sampler import Decoding, ProgressCallback, Request, Sample, Sampler
from poise.observe.progress import Progress
from poise.store.chunks import Chunk, ChunkFiles
from poise.train.context import Context

if TYPE_CHECKING:
    from poise.models.model_folder import ModelFolder

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
    """UserError that names the first question whose prompt leaves no room for `max_tokens` more tokens.

    `prompts` are pairs of a question's id or text and its tokens. `key` is the key of the spec that sets `max_tokens`.
    """
    for question, prompt in prompts:
        try:
            folder.check_context_length([prompt], max_tokens, key)
        except UserError as error:
            raise UserError(f"question {question[:60]!r}: {error}") from error


def sample_all(
    context: Context, sampler: Sampler, requests: Sequence[Request], decoding: Decoding, shard_size: int = 256
) -> list[list[Sample]]:
    """The samples of each request, in order. One rank calls it.

    A shard holds the samples of `shard_size` requests. Shards that the run already has are read, the others are sampled
    and committed.

    Raises:
        UserError: a shard of the run has the samples of other requests.
        IntegrityError: a shard of the run cannot be read.
    """
    shards = ChunkFiles(context.run, "samples/", _SCHEMA, inputs="prompts, seeds or decoding options")
    all_samples: list[list[Sample]] = []

    def report(before: int, answered: int) -> None:
        context.report(_progress(context.run.name, before + answered, len(requests)))

    for number, start in enumerate(range(0, len(requests), shard_size)):
        shard_requests = requests[start : start + shard_size]
        name = f"shard-{number:05}"
        fingerprint = _fingerprint(shard_requests, decoding)
        shard = shards.read(name, fingerprint)
        if shard is None:
            shard = _draw(sampler, shard_requests, decoding, partial(report, start))
            shards.commit(name, shard, fingerprint, context.check_lease)
            context.sink.inc("poise_samples_total", shard.facts["samples"], run=context.run.name)
            context.sink.inc("poise_sampled_tokens_total", shard.facts["tokens"], run=context.run.name)
        samples = _to_samples(shard.table)
        for request in shard_requests:
            all_samples.append([next(samples) for _ in range(request.n)])
        report(start, len(shard_requests))
    return all_samples


def _progress(run: str, answered: int, total: int) -> Progress:
    return Progress(run, "sample", answered / total, 1.0, answered, total, unit="requests")


def _draw(sampler: Sampler, requests: Sequence[Request], decoding: Decoding, on_progress: ProgressCallback) -> Chunk:
    """The samples of the requests of a shard, with their cost."""
    started = time.monotonic()
    samples = sampler.generate(requests, decoding, on_progress)
    seconds = time.monotonic() - started
    rows = [sample for request_samples in samples for sample in request_samples]
    facts = {
        "seconds": round(seconds, 3),
        "samples": len(rows),
        "tokens": sum(sample.num_tokens for sample in rows),
        "prompt_tokens": sum(len(request.prompt) for request in requests),
    }
    return Chunk(_to_table(rows), facts)


def _to_samples(table: pa.Table) -> Iterator[Sample]:
    """The sample of each row. Tokens and log-probabilities stay in arrays and never become Python objects."""
    for batch in table.to_batches():
        tokens = batch.column("tokens")
        logprobs = batch.column("logprobs")
        columns = [batch.column(name).to_pylist() for name in ("request", "index", "finish", "version")]
        for row, (request, index, finish, version) in enumerate(zip(*columns, strict=True)):
            row_tokens = tokens[row].values.to_numpy()
            row_logprobs = logprobs[row].values.to_numpy()
            yield Sample(request, index, row_tokens, row_logprobs, finish, version)


def _to_table(samples: Sequence[Sample]) -> pa.Table:
    """A table with one row per sample. The tokens of all samples are one buffer, and so are the logprobs."""
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
    return pa.table(columns, schema=_SCHEMA)


def _fingerprint(requests: Sequence[Request], decoding: Decoding) -> str:
    """The SHA-256 of the requests and the decoding options. The weights need not be in it: they belong to the run."""
    content = [asdict(decoding), *(asdict(request) for request in requests)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
