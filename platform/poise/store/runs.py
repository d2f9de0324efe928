"""Runs: what is kept of one, where, and which runs a store has.

A store's address is the parent of its runs: `store: runs` keeps run `digits` in `runs/digits/`, as
`spec.yaml, environment.json, inputs.json, manifest.json, metrics/*.parquet, checkpoints/step-*/, artifacts/,
events.jsonl`, and `records.jsonl` with the SHA-256 of each of them (see `result_files`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from poise.errors import DamagedError, UserError
from poise.spec import Name, Section
from poise.store.checkpoints import Checkpoints
from poise.store.lease import Lease
from poise.store.records import Damage, FileRecord
from poise.store.result_files import EVENTS, RECORDS, AppendedLines, RecordLog, ResultFiles
from poise.store.storage import Storage, open_storage

__all__ = ["Run", "RunManifest", "RunSummary", "Status", "list_runs", "open_run"]

Status = Literal["running", "finished", "failed", "stopped"]
"""`stopped` is a trial that its sweep has given up before its end."""

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_MANIFEST, _SPEC = "manifest.json", "spec.yaml"


class RunManifest(Section):
    """What a run is and how it ended."""

    name: str
    kind: str
    status: Status
    spec_sha256: str
    started: float = Field(description="when the run was first started (epoch s)")
    updated: float = Field(description="when this manifest was written (epoch s)")
    final_step: int | None = Field(default=None, description="the last step that was done")
    best_step: int | None = Field(default=None, description="the step of the best checkpoint")
    error: str | None = Field(default=None, description="why the run failed")
    files: dict[str, FileRecord] = Field(default={}, description="the results and what made them, by path in the run")
    appended: dict[str, FileRecord] = Field(default={}, description="what the files that only grow were at the end")
    sha256: str = Field(default="", description="of this manifest without this field")

    def content_sha256(self) -> str:
        """The SHA-256 of all that the manifest says."""
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


@dataclass(frozen=True)
class RunSummary:
    """One line of a list of runs. A run is interrupted if its manifest says running and no driver holds it."""

    name: str
    kind: str
    status: Status | Literal["interrupted", "damaged"]
    final_step: int | None
    best_step: int | None
    last_checkpoint: int | None
    updated: float


class Run:
    """One run of a store, by name. Opening it changes nothing."""

    def __init__(self, storage: Storage, name: str) -> None:
        """`UserError` if the name is not fit for a path."""
        try:
            self.name = _NAME.validate_python(name)
        except ValidationError as error:
            raise UserError(f"{name[:120]!r} cannot name a run: {error.errors()[0]['msg']}") from None
        self.storage = storage
        self.url = f"{storage.url}/{self.name}"
        self.checkpoints = Checkpoints(storage, f"{self.name}/checkpoints")
        self.results = ResultFiles(storage, self.name)
        self._events = AppendedLines(storage, self.key(EVENTS))

    def key(self, relative: str) -> str:
        """The key in the storage of a file of this run."""
        return f"{self.name}/{relative}"

    def read(self, relative: str) -> bytes:
        """The bytes of a file of this run; `FileNotFoundError` when there is none.

        `DamagedError` for a result that is not what was written, or that a commit vouches for and that is missing.
        """
        try:
            return self.results.read(relative)
        except FileNotFoundError:
            if relative != _MANIFEST and relative in self._vouched():
                raise DamagedError(f"{self.url}/{relative} is missing: it was committed, and is lost") from None
            raise

    def write(self, relative: str, data: bytes) -> None:
        """Create or replace a file of this run, atomically."""
        self.results.write({relative: data})

    def write_files(self, files: Mapping[str, bytes]) -> None:
        """`write` for several files, which are recorded together."""
        self.results.write(files)

    def upload(self, path: Path, relative: str) -> None:
        """Copy a local file into this run."""
        self.results.upload(path, relative)

    def download(self, relative: str, path: Path) -> None:
        """Copy a file of this run to a local path; `DamagedError` for a result that is not what was written."""
        self.results.download(relative, path)

    def exists(self) -> bool:
        """Whether a run of this name was ever started here."""
        return any(entry.key == self.key(_SPEC) for entry in self.storage.list(self.key(_SPEC)))

    def files(self, prefix: str = "") -> list[str]:
        """The files of this run whose path begins with `prefix`, sorted."""
        return [entry.key.removeprefix(f"{self.name}/") for entry in self.storage.list(self.key(prefix))]

    def committed_files(self, prefix: str) -> list[str]:
        """The results whose path begins with `prefix`: those that are there, and those that a commit vouches for.

        To read one that was lost is a `DamagedError`, so that nothing is ever summed up without it.
        """
        lost = [path for path in self._vouched() if path.startswith(prefix)]
        return sorted({*self.files(prefix), *lost})

    def lease(self, *, renew_s: float = 5.0, expires_s: float = 30.0) -> Lease:
        """The right to drive this run; enter it before anything is written."""
        return Lease(self.storage, self.name, renew_s=renew_s, expires_s=expires_s)

    def claim_spec(self, text: str, sha256: str) -> bool:
        """Give the run its spec: whether it is new. Only who holds the lease does.

        `text` is the resolved spec in YAML and `sha256` its hash, which decides where both are known. A run that has
        another spec already gives way if it has committed nothing, and is a `UserError` with the diff otherwise.
        """
        if self.storage.create(self.key(_SPEC), text.encode()):
            self.results.record_missing(_SPEC, text.encode())
            return True
        same = (known := self.manifest()) is not None and known.spec_sha256 == sha256
        try:
            stored = self.read(_SPEC).decode(errors="replace")
        except DamagedError:
            if not same:
                raise
            self.write(_SPEC, text.encode())  # what it was, since its hash is known
            return False
        if stored == text or same:
            self.results.record_missing(_SPEC, stored.encode())  # a driver may have died before it did
            return False
        if not self.has_committed():
            self._give_way(text)
            return True
        changes = difflib.unified_diff(stored.splitlines(), text.splitlines(), "stored", "given", n=1, lineterm="")
        raise UserError(
            f"run {self.name!r} in {self.storage.url} was started with another spec:\n"
            + "\n".join(changes)
            + f"\nchoose another name for the run, or remove it with: poise runs rm {self.url}"
        )

    def has_committed(self) -> bool:
        """Whether anything of this run counts: a checkpoint, samples, results, or that it has ended well."""
        folders = ("artifacts/", "samples/")
        known = self.manifest()
        if known is not None and known.status in ("finished", "stopped"):
            return True
        return bool(self.checkpoints.commits()) or any(self.files(folder) for folder in folders)

    def remove(self) -> None:
        """Remove all of this run, or raise `RunBusyError` while a driver holds it. What is removed is lost."""
        with self.lease() as lease:
            lock, spec = self.key("LOCK"), self.key(_SPEC)
            rest = [entry.key for entry in self.storage.list(f"{self.name}/") if entry.key not in (lock, spec)]
            self.storage.delete(rest)
            self.storage.sweep(0, f"{self.name}/")
            lease.check()
            self.storage.delete([spec, lock])  # the spec last: until then the run exists, and can be removed again

    def start(self, kind: str, spec_sha256: str) -> RunManifest:
        """Record that the run is running, for the first time or again."""
        known, now = self.manifest(), time.time()
        started = known.started if known else now
        return self._record(
            RunManifest(
                name=self.name, kind=kind, status="running", spec_sha256=spec_sha256, started=started, updated=now
            )
        )

    def finish(
        self,
        status: Literal["finished", "failed", "stopped"],
        *,
        final_step: int | None = None,
        best_step: int | None = None,
        error: str | None = None,
    ) -> RunManifest:
        """Record how the run ended, with the size and SHA-256 of every result and of what made it."""
        known = self.manifest()
        if known is None:
            raise UserError(f"run {self.name!r} in {self.storage.url} was not started")
        changes = {"status": status, "updated": time.time(), "final_step": final_step, "best_step": best_step}
        files = {"files": self.results.final_records(self._vouched()), "appended": self.results.appended()}
        return self._record(known.model_copy(update={**changes, **files, "error": error}))

    def manifest(self) -> RunManifest | None:
        """What is recorded of the run, None before `start`; `DamagedError` if it cannot be read."""
        try:
            manifest = RunManifest.model_validate_json(self.storage.read(self.key(_MANIFEST)))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise self._damaged_manifest(error.errors()[0]["msg"]) from error
        if manifest.sha256 != manifest.content_sha256():
            raise self._damaged_manifest("its sha256 differs")
        return manifest

    def append_events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Add events, one JSON object a line. Only who holds the lease does."""
        self._events.append(events)

    def events(self) -> list[dict[str, Any]]:
        """Every event, oldest first; a line that was torn by a crash comes as `{"event": "torn", "text": ...}`."""
        return [_event(line) for line in self._events.read().decode(errors="replace").splitlines() if line]

    def verify(self) -> list[Damage]:
        """Read every byte of every checkpoint and of every result, and say what is wrong."""
        damages = self.checkpoints.verify()
        try:
            known = self.manifest()
        except DamagedError as error:
            return [*damages, Damage(self.name, _MANIFEST, str(error))]
        ended = known if known is not None and known.status != "running" else None
        commit, appended = self.checkpoints.appended()
        if commit is not None:
            damages += self.results.verify_appended(appended, commit.name)
        if ended is not None:
            damages += self.results.verify_appended(ended.appended, _MANIFEST)
        return damages + self.results.verify(ended.files if ended else None, self._vouched())

    def summary(self) -> RunSummary:
        """The run in one line."""
        commits = self.checkpoints.commits()
        last = commits[-1].step if commits else None
        try:
            known = self.manifest()
        except DamagedError:
            return RunSummary(self.name, "?", "damaged", None, None, last, 0.0)
        if known is None:
            return RunSummary(self.name, "?", "interrupted", None, None, last, 0.0)
        idle = known.status == "running" and not Lease.is_held(self.storage, self.name)
        status = "interrupted" if idle else known.status
        return RunSummary(self.name, known.kind, status, known.final_step, known.best_step, last, known.updated)

    @staticmethod
    def names(storage: Storage) -> list[str]:
        """The names of all runs that were ever started in a storage, sorted."""
        found = []
        for folder in storage.folders():
            try:
                run = Run(storage, folder)
            except UserError:
                continue  # a folder that no run could have made
            if run.exists():
                found.append(run.name)
        return found

    def _give_way(self, text: str) -> None:
        """Become a new run with this spec, of which only the events tell what was before."""
        kept = {self.key(name) for name in (EVENTS, _SPEC, "LOCK")}
        self.storage.delete([entry.key for entry in self.storage.list(f"{self.name}/") if entry.key not in kept])
        self.results = ResultFiles(self.storage, self.name)
        self.write(_SPEC, text.encode())

    def _vouched(self) -> set[str]:
        """The paths of results that have to be there: the manifest of a run that has ended, or a commit, says so."""
        try:
            known = self.manifest()
        except DamagedError:
            known = None
        if known is not None and known.status != "running":
            return set(known.files)
        record = self.checkpoints.appended()[1].get(RECORDS)
        return set() if record is None else set(RecordLog.parse(self.results.log().data[: record.bytes]).versions)

    def _record(self, manifest: RunManifest) -> RunManifest:
        manifest = manifest.model_copy(update={"sha256": manifest.content_sha256()})
        self.storage.write(self.key(_MANIFEST), manifest.model_dump_json(indent=1).encode())
        return manifest

    def _damaged_manifest(self, why: str) -> DamagedError:
        return DamagedError(
            f"{self.url}/{_MANIFEST} is damaged ({why}): remove that one file and run again; "
            "checkpoints are not affected"
        )


def list_runs(storage: Storage) -> list[RunSummary]:
    """Every run of a storage, by name."""
    return [Run(storage, name).summary() for name in Run.names(storage)]


def open_run(store_url: str | Path, name: str, *, must_exist: bool = False) -> Run:
    """The run of this name in the store at an address; with `must_exist`, `UserError` that names a similar one."""
    run = Run(open_storage(store_url), name)
    if must_exist and not run.exists():
        names = Run.names(run.storage)
        near = difflib.get_close_matches(run.name, names, 1, cutoff=0.6)
        elsewhere = (
            f"`poise runs list {run.storage.url}` names those that are there" if names else "it has no run at all"
        )
        hint = f"is it {near[0]!r}?" if near else elsewhere
        raise UserError(f"there is no run {run.name!r} in {run.storage.url}: {hint}")
    return run


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        event = None
    return event if isinstance(event, dict) else {"event": "torn", "text": line}
