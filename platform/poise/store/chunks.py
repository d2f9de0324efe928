"""Chunks of a long computation: each is committed to its run once, and a resumed run reads it instead of computing it.

A chunk is a Parquet file of the run. Its metadata holds a fingerprint of everything that the chunk was computed from,
so that it is never taken for the result of something else, and further facts about it, such as its cost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from poise.errors import IntegrityError, UserError
from poise.store.parquet import from_parquet, to_parquet
from poise.store.runs import Run

__all__ = ["Chunk", "ChunkFiles"]

_FINGERPRINT = "fingerprint"
_METADATA_KEY = b"poise"


@dataclass(frozen=True)
class Chunk:
    """One chunk: its rows, and a JSON object of facts about it, such as its cost."""

    table: pa.Table
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class ChunkFiles:
    """The chunks of one computation of a run.

    Attributes:
        prefix: the beginning of their paths in the run, such as `samples/`.
        schema: the columns of every chunk.
        inputs: what a chunk is computed from, in words, for the error about a chunk of other inputs.
    """

    run: Run
    prefix: str
    schema: pa.Schema
    inputs: str

    def path(self, name: str) -> str:
        """The path of a chunk in the run."""
        return f"{self.prefix}{name}.parquet"

    def read(self, name: str, fingerprint: str) -> Chunk | None:
        """A committed chunk; None where the run does not have it.

        Raises:
            UserError: the chunk has another fingerprint.
            IntegrityError: it is damaged.
        """
        try:
            chunk, stored_fingerprint = self._read(name)
        except FileNotFoundError:
            return None
        if stored_fingerprint != fingerprint:
            raise UserError(
                f"{self.run.url}/{self.path(name)} was computed from other {self.inputs} than there are now: choose "
                "another name for the run"
            )
        return chunk

    def read_committed(self, name: str) -> Chunk:
        """A committed chunk, whatever it was computed from.

        Raises:
            FileNotFoundError: the run does not have it.
            IntegrityError: it is damaged.
        """
        chunk, _ = self._read(name)
        return chunk

    def commit(
        self,
        name: str,
        chunk: Chunk,
        fingerprint: str,
        check_lease: Callable[[], None],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Commit a chunk, atomically.

        `check_lease` raises if this writer has lost the lease of the run; then nothing is written. `files`, by their
        paths in the run, are written before the chunk, which may refer to them.
        """
        metadata = {_FINGERPRINT: fingerprint, **chunk.facts}
        table = chunk.table.cast(self.schema).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)})
        check_lease()
        self.run.write_files({**(files or {}), self.path(name): to_parquet(table)})

    def _read(self, name: str) -> tuple[Chunk, str]:
        """A committed chunk and its fingerprint. Raises as `read_committed` does."""
        data = self.run.read(self.path(name))
        try:
            table = from_parquet(data)
            facts = json.loads(table.schema.metadata[_METADATA_KEY])
            fingerprint = facts.pop(_FINGERPRINT)
            table = table.select(self.schema.names).cast(self.schema)
        except (pa.ArrowException, KeyError, TypeError, OSError, ValueError) as error:
            raise IntegrityError(
                f"{self.run.url}/{self.path(name)} is damaged ({error}): remove that one file and run again"
            ) from error
        return Chunk(table, facts), fingerprint
