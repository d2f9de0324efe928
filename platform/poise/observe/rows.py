"""Metrics as Parquet rows in long format: (step, epoch, split, name, value).

Names used by training: loss, accuracy, lr, sum_lr (the sum of all step sizes so far), grad_norm, loss/<threat>, clean,
robust/<threat>, robust/average, robust/union, weight/<threat>, gap/<threat>, overfitting/<measure>. Timing rows:
examples_per_s, seconds/<phase>. Wall-clock times are only in the split "timing", so that the other rows of two
identical runs have equal bytes. pyarrow is imported at use, since checking a spec does not need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from poise.errors import IntegrityError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SPLITS", "Rows", "read_rows", "schema"]

SPLITS = ("train", "validation", "test", "timing")


def schema() -> pa.Schema:
    """Columns of every metrics file: step int64, epoch float64, split string, name string, value float64."""
    import pyarrow as pa

    return pa.schema(
        {
            "step": pa.int64(),
            "epoch": pa.float64(),
            "split": pa.string(),
            "name": pa.string(),
            "value": pa.float64(),
        }
    )


class Rows:
    """A buffer of rows for one Parquet file."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, float, str, str, float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Append one row per entry of `values`; ValueError for a split that is not one of SPLITS."""
        if split not in SPLITS:
            raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {split!r}")
        self._rows += [(step, float(epoch), split, name, float(value)) for name, value in values.items()]

    def clear(self) -> None:
        """Remove all rows, after they were written."""
        self._rows.clear()

    def to_parquet(self) -> bytes:
        """A Parquet file of the rows in the order they were added, zstd-compressed; equal rows give equal bytes."""
        import pyarrow as pa

        from poise.store.parquet import to_parquet

        columns = zip(*self._rows, strict=True) if self._rows else [()] * 5
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema(), strict=True)]
        return to_parquet(pa.table(arrays, schema=schema()))


def read_rows(blobs: Iterable[bytes]) -> pa.Table:
    """The rows of several Parquet files as one table of `schema()`, sorted by step, split and name.

    The table is empty without `blobs`. IntegrityError for a blob that is not a Parquet file of rows.
    """
    import pyarrow as pa

    table = pa.concat_tables([schema().empty_table(), *map(_read, blobs)])
    return table.sort_by([(key, "ascending") for key in ("step", "split", "name")])


def _read(blob: bytes) -> pa.Table:
    import pyarrow as pa

    from poise.store.parquet import from_parquet

    try:
        table = from_parquet(blob)
        return table.select(schema().names).cast(schema())
    except (pa.ArrowException, KeyError, OSError) as error:
        raise IntegrityError(f"a metrics file cannot be read: {error}") from error
