"""The result files of a run, each with a record of its size and hash.

`records.jsonl` has a line for every version of every result file: its path, its size in bytes and its SHA-256. The line
is written before the file: a file without a line was not written by Poise, and a line without its file is a write that
was not finished. A file is read only if it is one of the recorded versions. `records.jsonl` and `events.jsonl` are
append-only (see `appended_lines`): each checkpoint records their size and hash at its commit, so that a changed or lost
line is found too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from poise.errors import IntegrityError
from poise.store.appended_lines import AppendedLines
from poise.store.records import Corruption, FileRecord, check_files, record_of
from poise.store.storage import Storage, sha256_of

__all__ = ["EVENTS", "RECORDS", "RecordLog", "ResultFiles"]

RECORDS = "records.jsonl"
EVENTS = "events.jsonl"
_FOLDERS = ("artifacts/", "metrics/", "samples/")
_RECORDED = (*_FOLDERS, "result.json", "spec.yaml", "environment.json", "inputs.json")
"""Paths of the files that are recorded. Files of checkpoints are not: they are in the manifests of the checkpoints."""

_REPRODUCIBLE = ("artifacts/", "samples/", "result.json")
"""Paths of the files that a run writes again if they are missing."""


@dataclass(frozen=True)
class RecordLog:
    """The content of `records.jsonl`: `data`, and the recorded versions of each path, the newest last."""

    data: bytes = b""
    versions: Mapping[str, list[FileRecord]] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: bytes) -> RecordLog:
        """Parse the lines; skips a line that a crash left incomplete."""
        versions: dict[str, list[FileRecord]] = {}
        for line in data.decode(errors="replace").splitlines():
            try:
                values = json.loads(line)
                path = values.pop("path")
                record = FileRecord.model_validate(values)
            except (ValueError, KeyError, AttributeError, TypeError, ValidationError):
                continue
            versions.setdefault(path, []).append(record)
        return cls(data, versions)

    def newest(self) -> dict[str, FileRecord]:
        """The newest version of every path."""
        return {path: records[-1] for path, records in self.versions.items()}


class ResultFiles:
    """The result files of the run below `prefix` (no slash at its ends)."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self.storage = storage
        self.prefix = prefix
        self.lines = AppendedLines(storage, f"{prefix}/{RECORDS}")
        self.events = AppendedLines(storage, f"{prefix}/{EVENTS}")
        self._log: RecordLog | None = None

    def write(self, files: Mapping[str, bytes]) -> None:
        """Create or replace files, each atomically, after one write that records all of them."""
        self.record({path: record_of(data) for path, data in files.items()})
        for path, data in files.items():
            self.storage.write(f"{self.prefix}/{path}", data)

    def upload(self, local: Path, path: str) -> None:
        """Copy a local file into the run."""
        self.record({path: FileRecord(bytes=local.stat().st_size, sha256=sha256_of(local))})
        self.storage.upload(local, f"{self.prefix}/{path}")

    def record(self, records: Mapping[str, FileRecord]) -> None:
        """Append the records of result files to `records.jsonl`; skips paths that are not recorded."""
        lines = []
        for path, record in records.items():
            if path.startswith(_RECORDED):
                lines.append({"path": path, **record.model_dump()})
        self.lines.append(lines)
        self._log = None

    def record_missing(self, path: str, data: bytes) -> None:
        """Record an existing file with these bytes, unless it has a record."""
        if path not in self.log().versions:
            self.record({path: record_of(data)})

    def read(self, path: str) -> bytes:
        """The bytes of a file; `FileNotFoundError` if there is none, `IntegrityError` if they are not recorded."""
        data = self.storage.read(f"{self.prefix}/{path}")
        self._check(path, record_of(data))
        return data

    def download(self, path: str, into: Path) -> None:
        """Copy a file to `into`, a local path; raises as `read` does, and then leaves nothing there."""
        self.storage.download(f"{self.prefix}/{path}", into)
        try:
            self._check(path, FileRecord(bytes=into.stat().st_size, sha256=sha256_of(into)))
        except IntegrityError:
            into.unlink()
            raise

    def log(self) -> RecordLog:
        """The content of `records.jsonl` as it is now."""
        self._log = RecordLog.parse(self.lines.known())
        return self._log

    def present(self) -> dict[str, int]:
        """The size in bytes of every present file that is recorded, by path."""
        start = len(self.prefix) + 1
        sizes = {}
        for part in _RECORDED:
            for entry in self.storage.list(f"{self.prefix}/{part}"):
                sizes[entry.key[start:]] = entry.size
        return sizes

    def appended(self) -> dict[str, FileRecord]:
        """The records of the append-only files as they are now, for a checkpoint or a manifest."""
        return {RECORDS: self.lines.record(), EVENTS: self.events.record()}

    def merge_appended(self) -> None:
        """Merge the objects that an append-only file has on S3, at the end of a run."""
        self.lines.merge_all()
        self.events.merge_all()

    def final_records(self, committed: Iterable[str]) -> dict[str, FileRecord]:
        """The record of every result at the end of the run, by path.

        A record without its file is left out, since that write was not finished, unless its path is in `committed`: the
        file was there once, and is lost.
        """
        newest = self.log().newest()
        present = self.present()
        required = {*present, *committed}
        records = {path: record for path, record in newest.items() if path in required}
        for path in present.keys() - newest.keys():
            records[path] = FileRecord(bytes=present[path], sha256=self._sha256(path))
        return dict(sorted(records.items()))

    def verify(self, final: Mapping[str, FileRecord] | None, committed: Iterable[str]) -> list[Corruption]:
        """Compare every result with its record in `final`, if the run has ended, or else in `records.jsonl`.

        A missing file is a corruption if its path is in `committed`.
        """
        present = self.present()
        if final is not None:
            return check_files(self.prefix, final, present, self._sha256)
        log = self.log()
        required = set(committed)
        corruptions = []
        for path in sorted({*log.versions, *present}):
            if path not in log.versions:
                corruptions.append(Corruption(self.prefix, path, "there is no record of it"))
            elif path in present or path in required:
                # The file may be any of its versions: a crash may have come between the record and the file.
                versions = log.versions[path]
                problems = [check_files(self.prefix, {path: version}, present, self._sha256) for version in versions]
                if [] not in problems:
                    corruptions += problems[-1]
        return corruptions

    def verify_appended(self, appended: Mapping[str, FileRecord], where: str) -> list[Corruption]:
        """Compare the beginnings of the append-only files with their records in `where`, a checkpoint or manifest."""
        corruptions = []
        files = {RECORDS: self.lines, EVENTS: self.events}
        for name, record in sorted(appended.items()):
            data = files[name].read() if name in files else b""
            if record_of(data[: record.bytes]) != record:
                problem = f"its first {record.bytes} bytes (of {len(data)}) are not those recorded in {where}"
                corruptions.append(Corruption(self.prefix, name, problem))
        return corruptions

    def _sha256(self, path: str) -> str:
        return self.storage.sha256(f"{self.prefix}/{path}")

    def _check(self, path: str, actual: FileRecord) -> None:
        """IntegrityError if a file has records and `actual` is none of them.

        Reads the log again before it raises: another process may have replaced the file in the meantime.
        """
        if not path.startswith(_RECORDED):
            return
        if self._log is not None and actual in self._log.versions.get(path, []):
            return
        versions = self.log().versions.get(path, [])
        if versions and actual not in versions:
            remedy = ": remove that one file and run again" if path.startswith(_REPRODUCIBLE) else ""
            raise IntegrityError(f"{self.storage.url}/{self.prefix}/{path} is damaged (its sha256 differs){remedy}")
