"""Rows of JSON lines, CSV or Parquet, from a file or a folder, local or on S3, each with its file and line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from poise.errors import UserError
from poise.store.parquet import from_parquet
from poise.store.storage import open_storage
from poise.user_code import current_folder_first, explain_errors, load_attribute

if TYPE_CHECKING:
    from poise.data.text.row_spec import Suffix
    from poise.data.text.spec import TextRows

__all__ = ["Row", "first_rows", "function_rows", "header_advice", "read_pair", "read_rows"]


_LONGEST_NAME = 30
"""Messages show so many characters of a field name. A longer column name is taken for data."""


@dataclass(frozen=True)
class Row:
    """The values of one row.

    `where` is its path and line for messages, `id` its file name and line; in Parquet the number of the row, from 1.
    """

    where: str
    id: str
    values: dict[str, Any]

    def text(self, key: str) -> str:
        """The value of a field that has to be text; UserError with file and line where it is missing or no text."""
        if key not in self.values:
            raise UserError(f"{self.where}: {self.missing(key)}")
        value = self.values[key]
        if not isinstance(value, str):
            raise UserError(f"{self.where}: {key!r} is {type(value).__name__}, not text")
        self.check_text(value, key)
        return value

    def missing(self, key: str) -> str:
        """The message for a missing field, with the names of the fields that exist."""
        return f"there is no {key!r}, only {self.fields() or 'nothing'}"

    def fields(self) -> str:
        """The names of the fields in one line, long ones cut."""
        return ", ".join(_cut(name) for name in sorted(map(str, self.values)))

    def check_text(self, text: str, key: str) -> None:
        """UserError for a text with half of a surrogate pair: JSON can escape one, and no tokenizer can read it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = error.start + 1
            raise UserError(f"{self.where}: {key!r} has half of a surrogate pair as character {place}") from error


def header_advice(columns: Iterable[str]) -> str:
    """Advice for a CSV file whose first line looks like values instead of column names; "" where it does not.

    Numbers, questions and long texts are taken for values. A first line of short words is taken for names.
    """
    if not any(_is_number(name) or name.endswith("?") or len(name) > _LONGEST_NAME for name in columns):
        return ""
    return "; its first line looks like data: put a line of column names before it, such as question,answer"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _cut(name: str) -> str:
    """A field name for messages: on one line, and cut where it is long."""
    one_line = " ".join(name.split())
    return one_line if len(one_line) <= _LONGEST_NAME else f"{one_line[:_LONGEST_NAME]}..."


def read_rows(path: str, suffix: Suffix, limit: int | None = None) -> list[Row]:
    """The first `limit` rows of a file, or of all files with this suffix below a folder, in the order of their names.

    Raises:
        UserError: there is no row, or a row is malformed; the message has file and line.
        StoreError: a folder or a bucket cannot be read.
    """
    parse = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}[suffix]
    all_rows = (row for where, name, data in _files(path, suffix) for row in parse(where, name, data))
    rows = list(islice(all_rows, limit))
    if not rows:
        raise UserError(f"{path} has no row to read")
    return rows


def read_pair(row: Row, spec: TextRows) -> tuple[str, str]:
    """The prompt and the completion in a row. UserError with file and line where one is missing or nothing to learn."""
    prompt = row.text(spec.prompt)
    completion = row.text(spec.completion)
    if not completion.strip():
        raise UserError(f"{row.where}: the completion is empty; there is nothing to learn")
    return prompt, completion


def function_rows(reference: str, arguments: Mapping[str, Any], field: str) -> list[Row]:
    """The rows that a function of the user's code returns; `field` of the spec names it.

    Raises:
        UserError: code is not allowed, the function fails, or it returns no rows.
    """
    function = load_attribute(reference, field)
    with explain_errors(f"{field}: {reference}"), current_folder_first():
        values = list(function(**arguments))
    if not values:
        raise UserError(f"{field}: {reference} returned no row")
    rows = []
    for number, row in enumerate(values, 1):
        where = f"{field}: row {number} of {reference}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where} is a {type(row).__name__}, not a mapping of names to values")
        rows.append(Row(where, f"{reference}:{number}", dict(row)))
    return rows


def first_rows(path: Path, suffix: Suffix, n: int, most_bytes: int | None = None) -> list[Row]:
    """The first rows of a local file, at most `n`; reads no more of the file than these rows take.

    Of JSON lines, only rows that begin within the first `most_bytes` bytes are read.

    Raises:
        UserError: as `read_rows`.
    """
    if suffix == ".parquet":
        try:
            batches = pq.ParquetFile(path).iter_batches(batch_size=n)
            values = next(batches, pa.RecordBatch.from_pylist([])).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is no Parquet file: {error}") from error
        return [Row(f"{path}:{number}", f"{path.name}:{number}", row) for number, row in enumerate(values[:n], 1)]
    if suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as text:
            return list(islice(_csv_rows(str(path), path.name, text), n))
    with path.open("rb") as file:
        data = b"".join(_first_lines(file, n, most_bytes))
    return list(_json_lines(str(path), path.name, data))


def _first_lines(file: BinaryIO, n: int, most_bytes: int | None) -> Iterator[bytes]:
    """Lines up to the `n`-th that is not blank. Blank lines are returned too, since they count in line numbers."""
    rows = 0
    size = 0
    for line in file:
        if rows == n or (most_bytes is not None and size >= most_bytes):
            return
        rows += bool(line.strip())
        size += len(line)
        yield line


def _files(path: str, suffix: Suffix) -> Iterator[tuple[str, str, bytes]]:
    """The address, name and bytes of the file at `path`, or of each file with this suffix in the folder at `path`."""
    folder, _, file = path.rpartition("/") if path.endswith(suffix) else (path, "", "")
    storage = open_storage(folder or ("/" if path.startswith("/") else "."))
    entries = storage.list(file)  # those whose names begin with `file`
    names = [entry.key for entry in entries if entry.key == file or (not file and entry.key.endswith(suffix))]
    if not names:
        raise UserError(f"{path} is no file *{suffix} and no folder that holds one")
    for name in names:
        yield f"{storage.url}/{name}", name, storage.read(name)


def _json_lines(where: str, name: str, data: bytes) -> Iterator[Row]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}:{number}: this line is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{where}:{number}: this line is {type(values).__name__}, not an object")
        yield Row(f"{where}:{number}", f"{name}:{number}", values)


def _csv(where: str, name: str, data: bytes) -> Iterator[Row]:
    return _csv_rows(where, name, io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline=""))


def _csv_rows(where: str, name: str, text: TextIO) -> Iterator[Row]:
    """The rows of a CSV file, whose first line names the columns; all values are text."""
    try:
        lines = csv.reader(text, strict=True)
        columns = next(lines, [])
        shown = list(map(_cut, columns))
        if len(set(columns)) < len(columns) or not all(columns):
            advice = header_advice(columns)
            raise UserError(
                f"{where}: the first line of a CSV file names its columns, each once; it is {shown}{advice}"
            )
        for values in lines:
            number = lines.line_num  # not a count of rows: a quoted value may span several lines
            if len(values) not in (0, len(columns)):  # the reader returns [] for a blank line
                raise UserError(f"{where}:{number}: {len(values)} values for the {len(columns)} columns {shown}")
            if values:
                yield Row(f"{where}:{number}", f"{name}:{number}", dict(zip(columns, values, strict=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where} is no CSV file in UTF-8: {error}") from error


def _parquet(where: str, name: str, data: bytes) -> Iterator[Row]:
    try:
        rows = from_parquet(data).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where} is no Parquet file: {error}") from error
    for number, values in enumerate(rows, 1):
        yield Row(f"{where}:{number}", f"{name}:{number}", values)
