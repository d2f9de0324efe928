"""Chunks: what was committed is read back as it was, and nothing else is taken for it."""

from __future__ import annotations

import pyarrow as pa
import pytest

from poise.errors import IntegrityError, RunBusyError, UserError
from poise.store.chunks import Chunk, ChunkFiles
from poise.store.runs import open_run

SCHEMA = pa.schema({"index": pa.int64(), "value": pa.list_(pa.int32())})
CHUNK = Chunk(pa.table({"index": [0, 1], "value": [[7], [8, 9]]}, schema=SCHEMA), {"seconds": 0.5, "cost": None})


@pytest.fixture
def chunks(tmp_path) -> ChunkFiles:
    return ChunkFiles(open_run(tmp_path, "run"), "artifacts/parts/", SCHEMA, inputs="weights")


def holds() -> None:
    """The lease is held."""


def test_a_chunk_is_read_back_as_it_was_committed(chunks) -> None:
    assert chunks.read("a/00000", "hash") is None
    chunks.commit("a/00000", CHUNK, "hash", holds, {"artifacts/more/a": b"more"})
    stored = chunks.read("a/00000", "hash")
    assert stored == chunks.read_committed("a/00000") == CHUNK
    assert chunks.run.files("artifacts/") == ["artifacts/more/a", "artifacts/parts/a/00000.parquet"]
    assert chunks.run.read("artifacts/more/a") == b"more"


def test_a_chunk_that_was_computed_from_something_else_is_refused(chunks) -> None:
    chunks.commit("a", CHUNK, "hash", holds)
    with pytest.raises(UserError, match=r"parts/a\.parquet was computed from other weights than there are now"):
        chunks.read("a", "another hash")


def test_a_writer_without_the_lease_writes_nothing(chunks) -> None:
    def lost() -> None:
        raise RunBusyError("taken over")

    with pytest.raises(RunBusyError):
        chunks.commit("a", CHUNK, "hash", lost, {"artifacts/more/a": b"more"})
    assert chunks.run.files() == []


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: data[:20] + b"x" + data[21:], lambda _: b""])
def test_a_damaged_chunk_is_named(chunks, damage) -> None:
    chunks.commit("a", CHUNK, "hash", holds)
    key = chunks.run.key("artifacts/parts/a.parquet")
    chunks.run.storage.write(key, damage(chunks.run.storage.read(key)))
    with pytest.raises(IntegrityError, match=r"parts/a\.parquet is damaged .* remove that one file"):
        chunks.read("a", "hash")


def test_a_parquet_file_that_is_no_chunk_is_named(chunks) -> None:
    other = ChunkFiles(chunks.run, chunks.prefix, pa.schema({"other": pa.int64()}), inputs="weights")
    other.commit("a", Chunk(pa.table({"other": [1]}), {}), "hash", holds)
    with pytest.raises(IntegrityError, match=r"parts/a\.parquet is damaged .* remove that one file"):
        chunks.read("a", "hash")
