from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from poise.errors import IntegrityError
from poise.observe.rows import Rows, read_rows, schema


def _filled(offset: int = 0) -> Rows:
    rows = Rows()
    rows.add(2 + offset, 0.5, "validation", {"robust/linf": 0.25, "clean": 0.5})
    rows.add(1 + offset, 0.25, "train", {"loss": math.nan, "lr": 0.1})
    return rows


def test_rows_come_back_sorted_with_their_types() -> None:
    table = read_rows([_filled(10).to_parquet(), _filled().to_parquet()])
    assert table.schema == schema()
    assert [str(t) for t in table.schema.types] == ["int64", "double", "string", "string", "double"]
    assert [tuple(row.values())[:4] for row in table.to_pylist()] == [
        (1, 0.25, "train", "loss"),
        (1, 0.25, "train", "lr"),
        (2, 0.5, "validation", "clean"),
        (2, 0.5, "validation", "robust/linf"),
        (11, 0.25, "train", "loss"),
        (11, 0.25, "train", "lr"),
        (12, 0.5, "validation", "clean"),
        (12, 0.5, "validation", "robust/linf"),
    ]
    values = table["value"].to_pylist()
    assert math.isnan(values[0])
    assert values[1:4] == [0.1, 0.5, 0.25]


def test_equal_rows_are_equal_bytes_and_a_changed_bit_is_not() -> None:
    assert _filled().to_parquet() == _filled().to_parquet()
    other = _filled()
    other.add(3, 1.0, "train", {"loss": math.nextafter(1.0, 2.0)})
    same = _filled()
    same.add(3, 1.0, "train", {"loss": 1.0})
    assert other.to_parquet() != same.to_parquet()


def test_an_empty_buffer_is_a_valid_file() -> None:
    rows = _filled()
    assert len(rows) == 4
    rows.clear()
    assert len(rows) == 0
    assert read_rows([rows.to_parquet()]) == read_rows([]) == schema().empty_table()


def test_a_wrong_split_or_value_is_refused_whole() -> None:
    rows = Rows()
    with pytest.raises(ValueError, match="validation"):
        rows.add(1, 0.0, "valid", {"loss": 1.0})
    with pytest.raises(ValueError):
        rows.add(1, 0.0, "train", {"loss": 1.0, "lr": "fast"})  # type: ignore[dict-item]
    assert len(rows) == 0


def test_damage_is_named() -> None:
    blob = _filled().to_parquet()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"step": [1]}), sink)
    for broken in (b"", b"PAR1", blob[: len(blob) // 2], bytes(sink.getvalue())):
        with pytest.raises(IntegrityError, match="metrics file"):
            read_rows([blob, broken])
