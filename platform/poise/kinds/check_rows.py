"""What is wrong with the files of rows that a spec names: texts to train on, and questions.

Files of moderate size are read wholly, by the functions that the run reads them with. Of larger ones the first rows
are, and a note says how many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poise.data.spec import JsonlText, ParquetText
from poise.errors import UserError
from poise.kinds.check_finding import Finding, shown

if TYPE_CHECKING:
    from poise.data.questions import QuestionFiles
    from poise.data.rows import Row, Suffix

__all__ = ["question_findings", "rows_to_check", "text_findings"]

_WHOLE_BYTES = 64 * 2**20
"""Files of so many bytes together are read wholly: five seconds and 0.6 GB for 370,000 short rows."""

_FIRST_ROWS = 10_000
"""Rows that are read of larger files."""


def text_findings(spec: JsonlText | ParquetText) -> Iterator[Finding]:
    """What keeps the rows of a text from being learned."""
    from poise.data.rows import first_rows, read_pair

    suffix: Suffix = ".jsonl" if isinstance(spec, JsonlText) else ".parquet"
    files, finding = _row_files(spec.path, suffix)
    if finding:
        yield finding
    if not files:
        return
    try:
        first = first_rows(files[0], suffix, 1)
        faults = list(_first_text_findings(first, spec, files[0]))
        yield from faults
        if faults:
            return
        rows, note = _rows_to_check(spec.path, files, suffix)
        for row in rows:
            read_pair(row, spec)
    except UserError as error:
        yield Finding("path", str(error))
        return
    if note:
        yield note


def question_findings(spec: QuestionFiles) -> Iterator[Finding]:
    """What keeps the rows of files from being asked."""
    from poise.data.questions import SUFFIXES, choose_rows, read_question, read_questions
    from poise.data.rows import first_rows

    suffix = SUFFIXES[spec.name]
    files, finding = _row_files(spec.path, suffix)
    if finding:
        yield finding
    if not files:
        return
    cure = ""
    try:
        first = first_rows(files[0], suffix, 1)
        if not first:
            yield Finding("path", f"{files[0]} has no row to read")
            return
        if {spec.question, spec.answers} <= first[0].values.keys():  # else the message lists the fields
            cure = f"; set question and answers to fields of the file, which has {first[0].fields()}"
        read_question(first[0], spec)
        cure = ""
        rows, note = _rows_to_check(spec.path, files, suffix)
        read_questions(rows if note else choose_rows(rows, spec.limit), spec)
    except UserError as error:
        yield Finding("path", f"{error}{cure}")
        return
    if note:
        yield note


def rows_to_check(path: str, suffix: Suffix) -> list[Row]:
    """The rows of local files, of large ones the first; [] where there is none. UserError for a row that is none."""
    files, _ = _row_files(path, suffix)
    return _rows_to_check(path, files, suffix)[0] if files else []


def _first_text_findings(rows: Sequence[Row], spec: JsonlText | ParquetText, file: Path) -> Iterator[Finding]:
    """What the first row says of the format of the whole file."""
    from poise.data.formats import JSON_LINES, told

    if not rows:
        yield Finding("path", f"{file} has no row to read")
        return
    values = rows[0].values
    for key in ("prompt", "completion"):
        field = getattr(spec, key)
        if field not in values:
            cure = told(values) or f"set {key} to the field that holds it, or write {JSON_LINES}"
            yield Finding("path", f"{rows[0].where}: {rows[0].missing(field)}: {cure}")
            return
        if not isinstance(values[field], str):
            yield Finding(key, f"{rows[0].where}: {field!r} is {type(values[field]).__name__}, not text")


def _rows_to_check(path: str, files: Sequence[Path], suffix: Suffix) -> tuple[list[Row], Finding | None]:
    """All rows of files of moderate size; else the first ones, and a note that says how many."""
    from poise.data.rows import first_rows, read_rows

    size = sum(file.stat().st_size for file in files)
    if size <= _WHOLE_BYTES:
        return read_rows(path, suffix), None
    rows = first_rows(files[0], suffix, _FIRST_ROWS, _WHOLE_BYTES)
    what = f"the first {len(rows):,} rows of {files[0]} were looked at"
    return rows, Finding("path", f"{what}; the run reads all of {path}, {size / 1e6:,.0f} MB", is_note=True)


def _row_files(path: str, suffix: str) -> tuple[list[Path], Finding | None]:
    """The local files that rows are read from, in the order of their names; or what is wrong with the path."""
    if "://" in path:
        return [], None
    place = Path(path).expanduser()
    if place.is_dir() and not path.endswith(suffix):
        files = sorted(file for file in place.rglob(f"*{suffix}") if file.is_file())
        return files, None if files else Finding("path", f"the folder {path} holds no file *{suffix}")
    if not place.exists():
        return [], Finding("path", f"{shown(place)} is not there", absent=True)
    if path.endswith(suffix) and place.is_file():
        return [place], None
    return [], Finding("path", f"{path} is no file *{suffix} and no folder that holds one{_other_format(place)}")


def _other_format(place: Path) -> str:
    from poise.data.formats import JSON_LINES, peek, told_of_list

    values = peek(place)
    cure = told_of_list(values) if values is not None else None
    return f": {cure}" if cure else f": write {JSON_LINES}"
