"""Runs: their files and manifests, and the list of the runs in a store.

The address of a store is the parent of its runs: with `store: runs` the run `digits` is in `runs/digits/`, as
`spec.yaml, environment.json, inputs.json, manifest.json, metrics/*.parquet, checkpoints/step-*/, artifacts/,
events.jsonl`, and `records.jsonl` with the SHA-256 of each of them (see `result_files`). On S3 the last two are objects
below `events/` and `records/` (see `appended_lines`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from poise.errors import IntegrityError, UserError
from poise.spec import Name, SpecModel
from poise.store.checkpoints import Checkpoints
from poise.store.lease import Lease
from poise.store.records import Corruption, FileRecord
from poise.store.result_files import EVENTS, RECORDS, RecordLog, ResultFiles
from poise.store.storage import Storage, open_storage

__all__ = ["Run", "RunManifest", "RunSummary", "Status", "list_runs", "open_run", "wrong_kind"]

Status = Literal["running", "finished", "failed", "stopped"]
"""`stopped` is the status of a trial that the scheduler of its sweep has stopped early."""

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_MANIFEST = "manifest.json"
_SPEC = "spec.yaml"


class RunManifest(SpecModel):
    """The identity of a run, its status, and the records of its files."""

    name: str
    kind: str
    status: Status
    spec_sha256: str
    started: float = Field(description="when the run was first started (epoch s)")
    updated: float = Field(description="when this manifest was written (epoch s)")
    final_step: int | None = Field(default=None, description="the last optimizer step")
    best_step: int | None = Field(default=None, description="the step of the best checkpoint")
    error: str | None = Field(default=None, description="why the run failed")
    files: dict[str, FileRecord] = Field(default={}, description="records of all results, by path in the run")
    appended: dict[str, FileRecord] = Field(default={}, description="records of the append-only files at the end")
    sha256: str = Field(default="", description="SHA-256 of this manifest without this field")

    def content_sha256(self) -> str:
        """The SHA-256 of all other fields of the manifest."""
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


@dataclass(frozen=True)
class RunSummary:
    """One line of a list of runs. `interrupted`: the manifest says `running` and no driver holds the lease."""

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
        """`UserError` if the name is not valid in a path."""
        try:
            self.name = _NAME.validate_python(name)
        except ValidationError as error:
            raise UserError(f"{name[:120]!r} cannot name a run: {error.errors()[0]['msg']}") from None
        self.storage = storage
        self.url = f"{storage.url}/{self.name}"
        self.checkpoints = Checkpoints(storage, f"{self.name}/checkpoints")
        self.results = ResultFiles(storage, self.name)

    def key(self, relative: str) -> str:
        """The storage key of a file of this run."""
        return f"{self.name}/{relative}"

    def read(self, relative: str) -> bytes:
        """The bytes of a file of this run; `FileNotFoundError` when there is none.

        `IntegrityError` for a result that differs from what was written, or that was committed and is missing.
        """
        try:
            return self.results.read(relative)
        except FileNotFoundError:
            if relative != _MANIFEST and relative in self._committed_results():
                raise IntegrityError(f"{self.url}/{relative} is missing: it was committed, and is lost") from None
            raise

    def write(self, relative: str, data: bytes) -> None:
        """Create or replace a file of this run, atomically."""
        self.results.write({relative: data})

    def write_files(self, files: Mapping[str, bytes]) -> None:
        """As `write`, for several files, which are recorded together."""
        self.results.write(files)

    def upload(self, path: Path, relative: str) -> None:
        """Copy a local file into this run."""
        self.results.upload(path, relative)

    def download(self, relative: str, path: Path) -> None:
        """Copy a file of this run to a local path; `IntegrityError` for a result that differs from what was written."""
        self.results.download(relative, path)

    def exists(self) -> bool:
        """Whether a run of this name was started in this store."""
        return any(entry.key == self.key(_SPEC) for entry in self.storage.list(self.key(_SPEC)))

    def files(self, prefix: str = "") -> list[str]:
        """The files of this run whose path begins with `prefix`, sorted."""
        return [entry.key.removeprefix(f"{self.name}/") for entry in self.storage.list(self.key(prefix))]

    def committed_files(self, prefix: str) -> list[str]:
        """The paths of results that begin with `prefix`: of present files, and of committed files that are missing.

        Reading a missing one raises `IntegrityError`, so that no summary leaves it out silently.
        """
        committed = [path for path in self._committed_results() if path.startswith(prefix)]
        return sorted({*self.files(prefix), *committed})

    def lease(self, *, renew_s: float = 5.0, expires_s: float = 30.0) -> Lease:
        """The lease of this run, to be entered before anything is written."""
        return Lease(self.storage, self.name, renew_s=renew_s, expires_s=expires_s)

    def claim_spec(self, text: str, sha256: str) -> bool:
        """Write the spec of the run, or check it. Returns whether the run is new. The caller holds the lease.

        `text` is the resolved spec in YAML and `sha256` its hash, by which specs are compared if the manifest has one.
        A run that has another spec already is replaced if it has committed nothing; otherwise raises `UserError` with
        the diff.
        """
        if self.storage.create(self.key(_SPEC), text.encode()):
            self.results.record_missing(_SPEC, text.encode())
            return True
        manifest = self.manifest()
        same = manifest is not None and manifest.spec_sha256 == sha256
        try:
            stored = self.read(_SPEC).decode(errors="replace")
        except IntegrityError:
            if not same:
                raise
            self.write(_SPEC, text.encode())  # restores the damaged file: its hash in the manifest is that of `text`
            return False
        if stored == text or same:
            self.results.record_missing(_SPEC, stored.encode())  # a driver may have died between the two writes
            return False
        if not self.has_committed():
            self._replace_spec(text)
            return True
        raise self._other_spec_error(stored, text)

    def check_spec(self, text: str, sha256: str) -> None:
        """`UserError` with the diff if the run was started with another spec. Writes nothing."""
        manifest = self.manifest()
        if manifest is not None and manifest.spec_sha256 == sha256:
            return
        stored = self.read(_SPEC).decode(errors="replace")
        if stored != text:
            raise self._other_spec_error(stored, text)

    def _other_spec_error(self, stored: str, text: str) -> UserError:
        changes = difflib.unified_diff(stored.splitlines(), text.splitlines(), "stored", "given", n=1, lineterm="")
        return UserError(
            f"run {self.name!r} in {self.storage.url} was started with another spec:\n"
            + "\n".join(changes)
            + f"\nchoose another name for the run, or remove it with: poise runs rm {self.url}"
        )

    def has_committed(self) -> bool:
        """Whether the run has a checkpoint, samples or results, or has finished or was stopped early."""
        prefixes = ("artifacts/", "samples/", "result.json")
        manifest = self.manifest()
        if manifest is not None and manifest.status in ("finished", "stopped"):
            return True
        return bool(self.checkpoints.commits()) or any(self.files(prefix) for prefix in prefixes)

    def remove(self) -> None:
        """Remove all files of this run; `RunBusyError` while a driver holds its lease. This cannot be undone."""
        with self.lease() as lease:
            lock = self.key("LOCK")
            spec = self.key(_SPEC)
            rest = [entry.key for entry in self.storage.list(f"{self.name}/") if entry.key not in (lock, spec)]
            self.storage.delete(rest)
            self.storage.sweep(0, f"{self.name}/")
            lease.check()
            # The spec last: as long as it is there the run exists, and removing it can be repeated after a crash.
            self.storage.delete([spec, lock])

    def start(self, kind: str, spec_sha256: str) -> RunManifest:
        """Write the manifest of a run that starts, for the first time or again."""
        previous = self.manifest()
        now = time.time()
        manifest = RunManifest(
            name=self.name,
            kind=kind,
            status="running",
            spec_sha256=spec_sha256,
            started=previous.started if previous else now,
            updated=now,
        )
        return self._write_manifest(manifest)

    def finish(
        self,
        status: Literal["finished", "failed", "stopped"],
        *,
        final_step: int | None = None,
        best_step: int | None = None,
        error: str | None = None,
    ) -> RunManifest:
        """Write the manifest of a run that has ended, with the size and SHA-256 of every result."""
        manifest = self.manifest()
        if manifest is None:
            raise UserError(f"run {self.name!r} in {self.storage.url} was not started")
        self.results.merge_appended()
        changes = {
            "status": status,
            "updated": time.time(),
            "final_step": final_step,
            "best_step": best_step,
            "files": self.results.final_records(self._committed_results()),
            "appended": self.results.appended(),
            "error": error,
        }
        return self._write_manifest(manifest.model_copy(update=changes))

    def manifest(self) -> RunManifest | None:
        """The manifest of the run; None before `start`, `IntegrityError` if it is damaged."""
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
        """Append events, one JSON object per line. The caller holds the lease."""
        self.results.events.append(events)

    def events(self) -> list[dict[str, Any]]:
        """Every event, oldest first; a line that a crash left incomplete is `{"event": "torn", "text": ...}`."""
        lines = self.results.events.read().decode(errors="replace").splitlines()
        return [_event(line) for line in lines if line]

    def verify(self) -> list[Corruption]:
        """Read every byte of every checkpoint and every result, and return the problems."""
        corruptions = self.checkpoints.verify()
        try:
            manifest = self.manifest()
        except IntegrityError as error:
            return [*corruptions, Corruption(self.name, _MANIFEST, str(error))]
        final = manifest if manifest is not None and manifest.status != "running" else None
        commit, appended = self.checkpoints.appended()
        if commit is not None:
            corruptions += self.results.verify_appended(appended, commit.name)
        if final is not None:
            corruptions += self.results.verify_appended(final.appended, _MANIFEST)
        return corruptions + self.results.verify(final.files if final else None, self._committed_results())

    def summary(self) -> RunSummary:
        """The line of this run in a list of runs."""
        commits = self.checkpoints.commits()
        last = commits[-1].step if commits else None
        try:
            manifest = self.manifest()
        except IntegrityError:
            return RunSummary(self.name, "?", "damaged", None, None, last, 0.0)
        if manifest is None:
            return RunSummary(self.name, "?", "interrupted", None, None, last, 0.0)
        is_idle = manifest.status == "running" and not Lease.is_held(self.storage, self.name)
        return RunSummary(
            name=self.name,
            kind=manifest.kind,
            status="interrupted" if is_idle else manifest.status,
            final_step=manifest.final_step,
            best_step=manifest.best_step,
            last_checkpoint=last,
            updated=manifest.updated,
        )

    @staticmethod
    def names(storage: Storage) -> list[str]:
        """The names of all runs that were started in a storage, sorted."""
        names = []
        for folder in storage.folders():
            try:
                run = Run(storage, folder)
            except UserError:
                continue  # the folder is not a run: its name is not valid for one
            if run.exists():
                names.append(run.name)
        return names

    def _replace_spec(self, text: str) -> None:
        """Make this a new run with another spec. All files are deleted but the events."""
        remaining = {self.key(name) for name in (EVENTS, _SPEC, "LOCK")}
        segments = self.key(EVENTS.removesuffix(".jsonl")) + "/"
        keys = [entry.key for entry in self.storage.list(f"{self.name}/")]
        self.storage.delete([key for key in keys if key not in remaining and not key.startswith(segments)])
        self.results = ResultFiles(self.storage, self.name)
        self.write(_SPEC, text.encode())

    def _committed_results(self) -> set[str]:
        """The paths of the results that must exist.

        Those of a run that has ended are in its manifest. Otherwise they are those recorded in `records.jsonl` when the
        newest checkpoint was committed.
        """
        try:
            manifest = self.manifest()
        except IntegrityError:
            manifest = None
        if manifest is not None and manifest.status != "running":
            return set(manifest.files)
        record = self.checkpoints.appended()[1].get(RECORDS)
        if record is None:
            return set()
        return set(RecordLog.parse(self.results.log().data[: record.bytes]).versions)

    def _write_manifest(self, manifest: RunManifest) -> RunManifest:
        """Write a manifest with its hash."""
        manifest = manifest.model_copy(update={"sha256": manifest.content_sha256()})
        self.storage.write(self.key(_MANIFEST), manifest.model_dump_json(indent=1).encode())
        return manifest

    def _damaged_manifest(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"{self.url}/{_MANIFEST} is damaged ({why}): remove that one file and run again; "
            "checkpoints are not affected"
        )


def list_runs(storage: Storage) -> list[RunSummary]:
    """Every run of a storage, by name."""
    return [Run(storage, name).summary() for name in Run.names(storage)]


def open_run(store_url: str | Path, name: str, *, must_exist: bool = False) -> Run:
    """The run `name` in the store at `store_url`. With `must_exist`, `UserError` if there is none."""
    run = Run(open_storage(store_url), name)
    if must_exist and not run.exists():
        names = Run.names(run.storage)
        similar = difflib.get_close_matches(run.name, names, 1, cutoff=0.6)
        if similar:
            hint = f"is it {similar[0]!r}?"
        elif names:
            hint = f"`poise runs list {run.storage.url}` names those that are there"
        else:
            hint = "it has no run at all"
        raise UserError(f"there is no run {run.name!r} in {run.storage.url}: {hint}")
    return run


def wrong_kind(name: str, kind: str, accepted: Sequence[str]) -> str:
    """The message about a run of a kind that cannot be used, with the kinds that can."""
    return f"run {name!r} is a {kind}; name a run of {' or '.join(accepted)}"


def _event(line: str) -> dict[str, Any]:
    """The event of a line; see `Run.events`."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        event = None
    return event if isinstance(event, dict) else {"event": "torn", "text": line}
