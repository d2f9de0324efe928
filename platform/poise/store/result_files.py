"""The result files of a run, each with a record of what it has to be.

`records.jsonl` has a line for every version of every result file: its path, its size in bytes and its SHA-256. The line
is written before the file, so that a file without a line was never written by Poise, and a line without its file is a
write that was not finished. A file is read only if it is one of the versions that were recorded. `records.jsonl` and
`events.jsonl` only ever grow: a checkpoint vouches for what they were when it was committed, so that a line that was
changed or lost is found too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from poise.errors import DamagedError
from poise.store.records import Damage, FileRecord, check_files, record_of
from poise.store.storage import Storage, sha256_of

__all__ = ["EVENTS", "RECORDS", "AppendedLines", "RecordLog", "ResultFiles"]

RECORDS, EVENTS = "records.jsonl", "events.jsonl"
_FOLDERS = ("artifacts/", "metrics/", "samples/")
_RECORDED = (*_FOLDERS, "spec.yaml", "environment.json", "inputs.json")
"""Where results and what made them are kept; checkpoints have manifests of their own."""

_MADE_AGAIN = ("artifacts/", "samples/")


@dataclass(frozen=True)
class RecordLog:
    """The lines of `records.jsonl`: for each path every version that was recorded, the newest last."""

    data: bytes = b""
    versions: Mapping[str, list[FileRecord]] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: bytes) -> RecordLog:
        """Read the lines; one that cannot be read, as a crash leaves it, records nothing."""
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


class AppendedLines:
    """A file of lines that only grows. Only who holds the lease of the run adds to it."""

    def __init__(self, storage: Storage, key: str) -> None:
        self.storage = storage
        self.key = key
        self._ends_whole = False

    def read(self) -> bytes:
        """All lines, also what a crash left half written; nothing where there is no file."""
        try:
            return self.storage.read(self.key)
        except FileNotFoundError:
            return b""

    def append(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Add one line of JSON for each of `values`."""
        lines = "".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values)
        if not lines:
            return
        if not self._ends_whole and (text := self.read()) and not text.endswith(b"\n"):
            lines = "\n" + lines  # what a dead driver left half written keeps to its own line
        self._ends_whole = False
        self.storage.append(self.key, lines.encode())
        self._ends_whole = True


class ResultFiles:
    """The result files of the run below `prefix` (no slash at its ends)."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self.storage = storage
        self.prefix = prefix
        self.lines = AppendedLines(storage, f"{prefix}/{RECORDS}")
        self._log: RecordLog | None = None

    def write(self, files: Mapping[str, bytes]) -> None:
        """Create or replace files, atomically each, after one write that records them all."""
        self.record({path: record_of(data) for path, data in files.items()})
        for path, data in files.items():
            self.storage.write(f"{self.prefix}/{path}", data)

    def upload(self, local: Path, path: str) -> None:
        """Copy a local file into the run."""
        self.record({path: FileRecord(bytes=local.stat().st_size, sha256=sha256_of(local))})
        self.storage.upload(local, f"{self.prefix}/{path}")

    def record(self, records: Mapping[str, FileRecord]) -> None:
        """Add to `records.jsonl` what the result files among `records` will be."""
        lines = [
            {"path": path, **record.model_dump()} for path, record in records.items() if path.startswith(_RECORDED)
        ]
        self.lines.append(lines)
        self._log = None

    def record_missing(self, path: str, data: bytes) -> None:
        """Record a file that is there already, with these bytes, unless it has a record."""
        if path not in self.log().versions:
            self.record({path: record_of(data)})

    def read(self, path: str) -> bytes:
        """The bytes of a file; `FileNotFoundError` where there is none, `DamagedError` if they were never written."""
        data = self.storage.read(f"{self.prefix}/{path}")
        self._check(path, record_of(data))
        return data

    def download(self, path: str, into: Path) -> None:
        """Copy a file to `into`, a local path; raises as `read` does, and then leaves nothing there."""
        self.storage.download(f"{self.prefix}/{path}", into)
        try:
            self._check(path, FileRecord(bytes=into.stat().st_size, sha256=sha256_of(into)))
        except DamagedError:
            into.unlink()
            raise

    def log(self) -> RecordLog:
        """What is recorded now."""
        self._log = RecordLog.parse(self.lines.read())
        return self._log

    def present(self) -> dict[str, int]:
        """The size in bytes of every file that is there, by path."""
        start = len(self.prefix) + 1
        entries = [entry for part in _RECORDED for entry in self.storage.list(f"{self.prefix}/{part}")]
        return {entry.key[start:]: entry.size for entry in entries}

    def appended(self) -> dict[str, FileRecord]:
        """What the files that only grow are now: for a checkpoint to vouch for, as their beginning."""
        files = {name: AppendedLines(self.storage, f"{self.prefix}/{name}").read() for name in (RECORDS, EVENTS)}
        return {name: record_of(data) for name, data in files.items()}

    def final_records(self, vouched: Iterable[str]) -> dict[str, FileRecord]:
        """What every result has to be at the end of the run, from the records of when it was written.

        A record without its file is left out, since that write was not finished, unless its path is in `vouched`.
        """
        newest, present = self.log().newest(), self.present()
        required = {*present, *vouched}
        records = {path: record for path, record in newest.items() if path in required}
        for path in present.keys() - newest.keys():
            records[path] = FileRecord(bytes=present[path], sha256=self._sha256(path))
        return dict(sorted(records.items()))

    def verify(self, final: Mapping[str, FileRecord] | None, vouched: Iterable[str]) -> list[Damage]:
        """Compare every result with its record: with `final`, of a run that has ended, or with `records.jsonl`."""
        present = self.present()
        if final is not None:
            return check_files(self.prefix, final, present, self._sha256)
        log, damages, required = self.log(), [], set(vouched)
        for path in sorted({*log.versions, *present}):
            if path not in log.versions:
                damages.append(Damage(self.prefix, path, "there is no record of it"))
            elif path in present or path in required:
                problems = [check_files(self.prefix, {path: one}, present, self._sha256) for one in log.versions[path]]
                damages += [] if [] in problems else problems[-1]
        return damages

    def verify_appended(self, appended: Mapping[str, FileRecord], where: str) -> list[Damage]:
        """Compare the beginning of the files that only grow with what `where` vouches for."""
        damages = []
        for name, record in sorted(appended.items()):
            data = AppendedLines(self.storage, f"{self.prefix}/{name}").read()
            if record_of(data[: record.bytes]) != record:
                problem = f"its first {record.bytes} bytes (of {len(data)}) are not those that {where} vouches for"
                damages.append(Damage(self.prefix, name, problem))
        return damages

    def _sha256(self, path: str) -> str:
        return self.storage.sha256(f"{self.prefix}/{path}")

    def _check(self, path: str, found: FileRecord) -> None:
        """DamagedError if a file is recorded and `found` is none of its versions.

        The log is read again before that is said: another process may have replaced the file in the meantime.
        """
        if not path.startswith(_RECORDED):
            return
        if self._log is not None and found in self._log.versions.get(path, []):
            return
        versions = self.log().versions.get(path, [])
        if versions and found not in versions:
            cure = ": remove that one file and run again" if path.startswith(_MADE_AGAIN) else ""
            raise DamagedError(f"{self.storage.url}/{self.prefix}/{path} is damaged (its sha256 differs){cure}")
