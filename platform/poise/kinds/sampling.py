"""Samples of many requests, committed in shards: what was drawn is in the store and is never drawn again.

A shard is `samples/shard-00000.parquet` of the run, a row per sample. Its metadata holds a fingerprint of the requests
and the decoding that it answers, so that a shard is never taken for the answer to something else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from poise.errors import DamagedError, UserError
from poise.models.sampling import Decoding, Request, Sample, Sampler
from poise.observe.progress import Progress
from poise.store.runs import Run
from poise.train.context import Context

__all__ = ["sample_all"]

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


def sample_all(
    context: Context, sampler: Sampler, requests: Sequence[Request], decoding: Decoding, shard_size: int = 256
) -> list[list[Sample]]:
    """The samples of each request, in order; of `shard_size` requests at a time. One rank calls it.

    A shard that the run has is read. UserError when it answers other requests, DamagedError when it cannot be read.
    """
    answers: list[list[Sample]] = []
    for number, start in enumerate(range(0, len(requests), shard_size)):
        share = requests[start : start + shard_size]
        known = _read(context.run, number, share, decoding)
        answers += known if known is not None else _draw(context, sampler, number, share, decoding)
        context.report(_progress(context.run.name, answers, len(requests)))
    return answers


def _progress(run: str, answers: Sequence[Sequence[Sample]], total: int) -> Progress:
    return Progress(run, "sample", len(answers) / total, 1.0, len(answers), total, unit="requests")


def _draw(
    context: Context, sampler: Sampler, number: int, requests: Sequence[Request], decoding: Decoding
) -> list[list[Sample]]:
    started = time.monotonic()
    answers = sampler.generate(requests, decoding)
    seconds = time.monotonic() - started
    samples = [sample for answer in answers for sample in answer]
    tokens = sum(len(sample.tokens) for sample in samples)
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
    rows = iter(table.to_pylist())
    return [[_sample(next(rows)) for _ in range(request.n)] for request in requests]


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(**{**row, "tokens": tuple(row["tokens"]), "logprobs": tuple(row["logprobs"])})


def _encoded(samples: Sequence[Sample], told: dict[str, Any]) -> bytes:
    table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"poise": json.dumps(told)}), sink, compression="zstd")
    return bytes(sink.getvalue())


def _fingerprint(requests: Sequence[Request], decoding: Decoding) -> str:
    """The SHA-256 of all that decides what is drawn, the weights aside: these are the run's own."""
    asked = [asdict(decoding), *(asdict(request) for request in requests)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _name(number: int) -> str:
    return f"samples/shard-{number:05}.parquet"
