"""Records of the content of stored files, and the problems of files that differ from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from poise.errors import IntegrityError
from poise.spec import SpecModel
from poise.store.storage import sha256_of

__all__ = ["Corruption", "FileRecord", "check_files", "listed", "record_of", "records_of"]


@dataclass(frozen=True)
class Corruption:
    """A problem of one stored file: the checkpoint or run that it belongs to, its name there, the problem."""

    where: str
    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}/{self.file}: {self.problem}"


class FileRecord(SpecModel):
    """The size of a file in bytes and its hexadecimal SHA-256."""

    bytes: int
    sha256: str


def record_of(data: bytes) -> FileRecord:
    """The record of a file with these bytes."""
    return FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def records_of(folder: Path) -> dict[str, FileRecord]:
    """The record of every file below a local folder, by its path in the folder, with '/' as separator."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    records = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        records[name] = FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
    return records


def check_files(
    where: str,
    records: Mapping[str, FileRecord],
    sizes: Mapping[str, int],
    sha256: Callable[[str], str] | None = None,
) -> list[Corruption]:
    """The files that differ from their records, by `sizes` and, with a function `sha256` of the name, by content.

    `where` names the checkpoint or run in the results.
    """
    corruptions = []
    for name, record in sorted(records.items()):
        problem = _problem(name, record, sizes.get(name), sha256)
        if problem:
            corruptions.append(Corruption(where, name, problem))
    return corruptions


def _problem(name: str, record: FileRecord, size: int | None, sha256: Callable[[str], str] | None) -> str | None:
    """How a file differs from its record; None if it does not. `size` is None if the file is missing."""
    if size is None:
        return "missing"
    if size != record.bytes:
        return f"{size} bytes instead of {record.bytes}"
    try:
        return "sha256 differs" if sha256 is not None and sha256(name) != record.sha256 else None
    except FileNotFoundError:
        return "missing"
    except IntegrityError as error:
        return str(error)


def listed(problems: Iterable[Corruption]) -> str:
    """Problems as one text, separated by semicolons."""
    return "; ".join(map(str, problems))
