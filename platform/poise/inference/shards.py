"""Samples of many requests, committed to the store in shards and read from there when a run is resumed.

A shard is the file `samples/shard-00000.parquet` of the run, with one row per sample. Its metadata holds a fingerprint
of its requests and of the decoding options, so that it is never used for other requests.
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

from poise.errors import IntegrityError, UserError
from poise.inference.sampler import Decoding, ProgressCallback, Request, Sample, Sampler
from poise.observe.progress import Progress
from poise.store.runs import Run
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
    all_samples: list[list[Sample]] = []

    def report(before: int, answered: int) -> None:
        context.report(_progress(context.run.name, before + answered, len(requests)))

    for number, start in enumerate(range(0, len(requests), shard_size)):
        shard_requests = requests[start : start + shard_size]
        samples = _read(context.run, number, shard_requests, decoding)
        if samples is None:
            samples = _draw(context, sampler, number, shard_requests, decoding, partial(report, start))
        all_samples += samples
        report(start, len(shard_requests))
    return all_samples


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
    """Sample a shard and commit it with its cost; the samples of each request."""
    started = time.monotonic()
    samples = sampler.generate(requests, decoding, on_progress)
    seconds = time.monotonic() - started
    rows = [sample for request_samples in samples for sample in request_samples]
    tokens = sum(sample.num_tokens for sample in rows)
    metadata = {
        "fingerprint": _fingerprint(requests, decoding),
        "seconds": round(seconds, 3),
        "samples": len(rows),
        "tokens": tokens,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
    }
    context.check_lease()
    context.run.write(_name(number), _to_parquet(rows, metadata))
    context.sink.inc("poise_samples_total", len(rows), run=context.run.name)
    context.sink.inc("poise_sampled_tokens_total", tokens, run=context.run.name)
    return samples


def _read(run: Run, number: int, requests: Sequence[Request], decoding: Decoding) -> list[list[Sample]] | None:
    """The samples of each request from a shard of the run; None where the run does not have it."""
    try:
        data = run.read(_name(number))
    except FileNotFoundError:
        return None
    path = f"{run.url}/{_name(number)}"
    try:
        table = pq.read_table(pa.BufferReader(data)).cast(_SCHEMA)
        metadata = json.loads(pq.read_metadata(pa.BufferReader(data)).metadata[b"poise"])
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged ({error}): remove that one file and run again") from error
    if metadata["fingerprint"] != _fingerprint(requests, decoding):
        raise UserError(
            f"{path} answers other prompts, seeds or decoding than are asked for now; choose another name for the run"
        )
    rows = _from_table(table)
    samples: list[list[Sample]] = []
    for request in requests:
        samples.append([next(rows) for _ in range(request.n)])
    return samples


def _from_table(table: pa.Table) -> Iterator[Sample]:
    """The sample of each row. Tokens and log-probabilities stay in arrays and never become Python objects."""
    for batch in table.to_batches():
        tokens = batch.column("tokens")
        logprobs = batch.column("logprobs")
        columns = [batch.column(name).to_pylist() for name in ("request", "index", "finish", "version")]
        for row, (request, index, finish, version) in enumerate(zip(*columns, strict=True)):
            row_tokens = tokens[row].values.to_numpy()
            row_logprobs = logprobs[row].values.to_numpy()
            yield Sample(request, index, row_tokens, row_logprobs, finish, version)


def _to_parquet(samples: Sequence[Sample], metadata: dict[str, Any]) -> bytes:
    """A Parquet file with one row per sample. The tokens of all samples are one buffer, and so are the logprobs."""
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
    pq.write_table(table.replace_schema_metadata({"poise": json.dumps(metadata)}), sink, compression="zstd")
    return bytes(sink.getvalue())


def _fingerprint(requests: Sequence[Request], decoding: Decoding) -> str:
    """The SHA-256 of the requests and the decoding options. The weights need not be in it: they belong to the run."""
    content = [asdict(decoding), *(asdict(request) for request in requests)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _name(number: int) -> str:
    return f"samples/shard-{number:05}.parquet"
