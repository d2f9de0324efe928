"""What a stored file has to be, and what is said when it is not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from poise.errors import DamagedError
from poise.spec import Section
from poise.store.storage import sha256_of

__all__ = ["Damage", "FileRecord", "check_files", "listed", "record_of", "records_of"]


@dataclass(frozen=True)
class Damage:
    """What is wrong with one stored file: the checkpoint or run that it belongs to, its name there, the finding."""

    where: str
    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}/{self.file}: {self.problem}"


class FileRecord(Section):
    """What a file has to be: its size in bytes and its hexadecimal SHA-256."""

    bytes: int
    sha256: str


def record_of(data: bytes) -> FileRecord:
    """The record of a file that has these bytes."""
    return FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def records_of(folder: Path) -> dict[str, FileRecord]:
    """The record of every file below a local folder, by its path in it with '/'."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    }


def check_files(
    where: str,
    records: Mapping[str, FileRecord],
    sizes: Mapping[str, int],
    sha256: Callable[[str], str] | None = None,
) -> list[Damage]:
    """Compare the files of `where` with their records: by `sizes` alone or, given how to hash one, by content."""
    found = ((name, _problem(name, record, sizes.get(name), sha256)) for name, record in sorted(records.items()))
    return [Damage(where, name, problem) for name, problem in found if problem]


def _problem(name: str, record: FileRecord, size: int | None, sha256: Callable[[str], str] | None) -> str | None:
    if size is None:
        return "missing"
    if size != record.bytes:
        return f"{size} bytes instead of {record.bytes}"
    try:
        return "sha256 differs" if sha256 is not None and sha256(name) != record.sha256 else None
    except FileNotFoundError:
        return "missing"
    except DamagedError as error:
        return str(error)


def listed(problems: Iterable[Damage]) -> str:
    """Problems for a message: one after the other."""
    return "; ".join(map(str, problems))
