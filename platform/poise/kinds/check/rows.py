"""Checks of the files of rows that a spec names: texts to train on, and questions.

Files of moderate size are read in full, by the functions that the run reads them with. Of larger files the first rows
are read, and a note says how many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poise.data.text.spec import JsonlText, ParquetText
from poise.errors import UserError
from poise.kinds.check.field_error import FieldError, absolute_path_hint

if TYPE_CHECKING:
    from poise.data.text.question_spec import QuestionFiles
    from poise.data.text.records import Row
    from poise.data.text.row_spec import Suffix

__all__ = ["question_errors", "rows_to_check", "text_errors"]

_WHOLE_BYTES = 64 * 2**20
"""Files of at most so many bytes together are read in full: 370,000 short rows take five seconds and 0.6 GB."""

_FIRST_ROWS = 10_000
"""The number of rows that are read of larger files."""


def text_errors(spec: JsonlText | ParquetText) -> Iterator[FieldError]:
    """What is wrong with the rows of a text to train on."""
    from poise.data.text.records import first_rows, read_pair

    suffix = spec.suffix
    files, error = _row_files(spec.path, suffix)
    if error:
        yield error
    if not files:
        return
    try:
        head = first_rows(files[0], suffix, 1)
        format_errors = list(_text_format_errors(head, spec, files[0]))
        yield from format_errors
        if format_errors:
            return
        rows, note = _rows_to_check(spec.path, files, suffix)
        for row in rows:
            read_pair(row, spec)
    except UserError as error:
        yield FieldError(("path",), str(error))
        return
    if note:
        yield note


def question_errors(spec: QuestionFiles) -> Iterator[FieldError]:
    """What is wrong with the rows of files of questions."""
    from poise.data.text.questions import (
        choose_rows,
        read_question,
        read_questions,
    )
    from poise.data.text.records import first_rows

    suffix = spec.suffix
    files, error = _row_files(spec.path, suffix)
    if error:
        yield error
    if not files:
        return
    cure = ""
    try:
        head = first_rows(files[0], suffix, 1)
        if not head:
            yield FieldError(("path",), f"{files[0]} has no row to read")
            return
        # Where a field is missing, the message of read_question lists the fields itself.
        if {spec.question, spec.answers} <= head[0].values.keys():
            cure = f"; set question and answers to fields of the file, which has {head[0].fields()}"
        read_question(head[0], spec)
        cure = ""
        rows, note = _rows_to_check(spec.path, files, suffix)
        read_questions(rows if note else choose_rows(rows, spec.limit), spec)
    except UserError as error:
        yield FieldError(("path",), f"{error}{cure}")
        return
    if note:
        yield note


def rows_to_check(path: str, suffix: Suffix) -> list[Row]:
    """The rows of local files; of large files the first ones; [] where there is no such file.

    Raises:
        UserError: a row cannot be read.
    """
    files, _ = _row_files(path, suffix)
    return _rows_to_check(path, files, suffix)[0] if files else []


def _text_format_errors(rows: Sequence[Row], spec: JsonlText | ParquetText, file: Path) -> Iterator[FieldError]:
    """What the first row shows to be wrong with the format of the whole file."""
    from poise.data.text.formats import JSON_LINES, format_advice

    if not rows:
        yield FieldError(("path",), f"{file} has no row to read")
        return
    values = rows[0].values
    for key in ("prompt", "completion"):
        field = getattr(spec, key)
        if field not in values:
            cure = format_advice(values) or f"set {key} to the field that holds it, or write {JSON_LINES}"
            yield FieldError(("path",), f"{rows[0].where}: {rows[0].missing(field)}: {cure}")
            return
        if not isinstance(values[field], str):
            yield FieldError((key,), f"{rows[0].where}: {field!r} is {type(values[field]).__name__}, not text")


def _rows_to_check(path: str, files: Sequence[Path], suffix: Suffix) -> tuple[list[Row], FieldError | None]:
    """All rows of files of moderate size and None; of larger files the first rows, and a note that says how many."""
    from poise.data.text.records import first_rows, read_rows

    size = sum(file.stat().st_size for file in files)
    if size <= _WHOLE_BYTES:
        return read_rows(path, suffix), None
    rows = first_rows(files[0], suffix, _FIRST_ROWS, _WHOLE_BYTES)
    what = f"the first {len(rows):,} rows of {files[0]} were looked at"
    note = FieldError(("path",), f"{what}; the run reads all of {path}, {size / 1e6:,.0f} MB", is_note=True)
    return rows, note


def _row_files(path: str, suffix: str) -> tuple[list[Path], FieldError | None]:
    """The local files that rows are read from, sorted by name, or none and what is wrong with the path."""
    if "://" in path:
        return [], None
    local = Path(path).expanduser()
    if local.is_dir() and not path.endswith(suffix):
        files = sorted(file for file in local.rglob(f"*{suffix}") if file.is_file())
        return files, None if files else FieldError(("path",), f"the folder {path} holds no file *{suffix}")
    if not local.exists():
        return [], FieldError(("path",), f"{absolute_path_hint(local)} is not there", absent=True)
    if path.endswith(suffix) and local.is_file():
        return [local], None
    cure = _cure_for_other_format(local)
    return [], FieldError(("path",), f"{path} is no file *{suffix} and no folder that holds one{cure}")


def _cure_for_other_format(file: Path) -> str:
    """What to do with a file of another format, as the end of a message."""
    from poise.data.text.formats import JSON_LINES, list_advice, peek

    values = peek(file)
    cure = list_advice(values) if values is not None else None
    return f": {cure}" if cure else f": write {JSON_LINES}"
