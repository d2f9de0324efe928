"""Tables as bytes of a Parquet file, and back."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["from_parquet", "to_parquet"]


def to_parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file, zstd-compressed; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def from_parquet(data: bytes) -> pa.Table:
    """The table of a Parquet file, with the metadata of its schema.

    Raises:
        pa.ArrowException, OSError: the bytes are no Parquet file.
    """
    # Without Arrow's thread pools: a process that exits while one starts is aborted.
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
