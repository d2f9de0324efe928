"""Checkpoints: committed atomically, and verified whenever they are read.

A checkpoint is the folder `step-00000040/`: its files, `manifest.json` with the size and SHA-256 of each, and
`COMMITTED`, which is created by a conditional write and holds the SHA-256 of the manifest. Readers trust only a
manifest with that hash, and verify every file by it. Invariant, also after a crash at any point: `COMMITTED` is the
last object of a checkpoint to be written and the first to be deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from poise.errors import IntegrityError, StoreError, UserError
from poise.spec import SpecModel
from poise.store.records import Corruption, FileRecord, check_files, listed, records_of
from poise.store.storage import Entry, Storage, check_key, sha256_of

__all__ = ["Checkpoints", "Commit"]

_MANIFEST = "manifest.json"
_COMMITTED = "COMMITTED"
_STEP = re.compile(r"step-(\d{8,12})")


@dataclass(frozen=True, order=True)
class Commit:
    """A committed checkpoint: its step, the key of its folder, its size in bytes and its time (epoch seconds)."""

    step: int
    key: str
    size: int
    committed: float

    @property
    def name(self) -> str:
        """The name of its folder, such as `step-00000040`."""
        return self.key.rpartition("/")[2]


class _Manifest(SpecModel):
    """The content of `manifest.json`: the files of the checkpoint, and the records of the run's append-only files."""

    step: int
    files: dict[str, FileRecord]
    info: dict[str, Any]
    appended: dict[str, FileRecord] = Field(default={})

    def encoded(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()


class Checkpoints:
    """The checkpoints of one run, below `prefix` (no slash at its ends). A caller that writes holds the run's lease."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self.storage = storage
        self.prefix = check_key(prefix)
        self._complete: dict[str, list[Entry]] = {}
        """Objects of each commit that the last `prune` found complete, by the key of its folder."""

    def commit(
        self,
        step: int,
        folder: Path,
        *,
        info: dict[str, Any],
        appended: Mapping[str, FileRecord] | None = None,
        check_lease: Callable[[], None] | None = None,
    ) -> Commit:
        """Upload every file below a local folder and commit them as the checkpoint of `step`.

        `info` is a JSON object that `info()` returns. `appended` are the records of the run's append-only files as they
        are now, which `appended()` returns: `Run.verify` compares the beginnings of those files with them.
        `check_lease` raises if this writer has lost its lease; it is called before anything is changed and again right
        before the commit becomes visible.

        If the step is committed already: returns that commit if it has the same files, moves it to `damaged/` and
        commits the new files if it is damaged, and raises `StoreError` otherwise.
        """
        check_lease = check_lease or _no_check
        manifest = _new_manifest(step, folder, info, appended or {})
        key = self._key(step)
        check_lease()
        entries = self._entries(key)
        if existing := _commit(step, key, entries):
            if not self.examine(existing):
                self._check_same_files(existing, manifest)
                return existing
            self._quarantine(existing)
        else:
            self.storage.delete([entry.key for entry in entries])
        for name in manifest.files:
            self.storage.upload(folder / name, f"{key}/{name}")
        self.storage.write(f"{key}/{_MANIFEST}", manifest.encoded())
        if problems := check_files(key, manifest.files, self._sizes(key)):
            raise IntegrityError(f"{self.storage.url}: the upload arrived damaged: {listed(problems)}: run again")
        check_lease()
        return self._publish(step, manifest)

    def commits(self) -> list[Commit]:
        """All commits, oldest first. Their files are not examined."""
        return [commit for _, commit in self._folders() if commit]

    def at(self, step: int) -> Commit:
        """The commit of `step`; `IntegrityError` if there is none."""
        commit = _commit(step, self._key(step), self._entries(self._key(step)))
        if commit is None:
            raise IntegrityError(f"{self.storage.url}/{self._key(step)}: the checkpoint of step {step} is not there")
        return commit

    def info(self, commit: Commit) -> dict[str, Any]:
        """The `info` of a commit; `IntegrityError` if its manifest is damaged."""
        manifest = self._manifest(commit)
        if isinstance(manifest, Corruption):
            raise IntegrityError(f"{self.storage.url}: {manifest}")
        return manifest.info

    def appended(self) -> tuple[Commit | None, dict[str, FileRecord]]:
        """The newest commit with an undamaged manifest, and its records of the append-only files, or (None, {})."""
        for commit in reversed(self.commits()):
            manifest = self._manifest(commit)
            if not isinstance(manifest, Corruption):
                return commit, manifest.appended
        return None, {}

    def fetch(self, commit: Commit, into: Path, *, names: Collection[str] | None = None) -> Path:
        """Download a checkpoint to `into`, a folder that is new or empty, and verify every byte.

        With `names`, only these files are downloaded and verified. Raises `IntegrityError` that names each damaged
        file and its problem; `into` is then removed.
        """
        if problems := self._fetch(commit, into, names):
            raise IntegrityError(f"{self.storage.url}: the checkpoint is damaged: {listed(problems)}")
        return into

    def latest_valid(self, into: Path) -> tuple[Commit | None, list[Corruption]]:
        """Fetch the newest valid checkpoint to `into`. Returns its commit, and the problems of the newer ones.

        `into` is new or empty; it is removed when no checkpoint is valid. Nothing in the store is deleted.
        """
        skipped: list[Corruption] = []
        for key, commit in reversed(self._folders()):
            problems = self._fetch(commit, into) if commit else [_incomplete(key)]
            if commit and not problems:
                return commit, skipped
            skipped += problems
        return None, skipped

    def examine(self, commit: Commit) -> list[Corruption]:
        """Read every byte of a checkpoint in the store, and return its problems."""
        return self._compare(commit, lambda name: self.storage.sha256(f"{commit.key}/{name}"))

    def verify(self) -> list[Corruption]:
        """The problems of every checkpoint, oldest first; an incomplete upload is a problem too."""
        corruptions = []
        for key, commit in self._folders():
            corruptions += self.examine(commit) if commit else [_incomplete(key)]
        return corruptions

    def prune(self, keep: int, protect: Collection[int] = ()) -> list[int]:
        """Remove all commits older than the `keep` newest complete ones, except steps in `protect`.

        Returns the steps removed. A commit is complete if its files have their sizes; one that is not does not count
        towards `keep`. A commit that was complete is compared again only if the list of its objects has changed, so
        that the number of requests does not depend on `keep`.
        """
        if keep < 1:
            raise UserError(f"at least 1 checkpoint has to be kept, not {keep}")
        num_complete = 0
        removed = []
        previous = self._complete
        self._complete = {}
        for step, key, entries in reversed(self._steps()):
            commit = _commit(step, key, entries)
            if commit is None:
                continue
            if num_complete < keep:
                if previous.get(key) == entries or not self._compare(commit, None):
                    self._complete[key] = entries
                    num_complete += 1
            elif step not in protect:
                self._remove(commit)
                removed.append(step)
        return removed

    def remove(self, step: int) -> None:
        """Remove the commit of `step`, if there is one."""
        if commit := _commit(step, self._key(step), self._entries(self._key(step))):
            self._remove(commit)

    def sweep(self, older_than_s: float) -> list[str]:
        """Remove incomplete uploads and damaged checkpoints that were last modified more than `older_than_s` ago.

        Returns the keys of the folders removed. A caller without the run's lease must choose an age that exceeds the
        longest upload.
        """
        before = time.time() - older_than_s
        orphans = [key for key, commit in self._folders() if commit is None] + sorted(self._damaged())
        removed = []
        for key in orphans:
            entries = self._entries(key)
            if max((entry.modified for entry in entries), default=before) < before:
                self.storage.delete([entry.key for entry in entries])
                removed.append(key)
        return removed

    def _key(self, step: int) -> str:
        return f"{self.prefix}/step-{step:08d}"

    def _entries(self, key: str) -> list[Entry]:
        return self.storage.list(f"{key}/")

    def _sizes(self, key: str) -> dict[str, int]:
        return {entry.key.removeprefix(f"{key}/"): entry.size for entry in self._entries(key)}

    def _steps(self) -> list[tuple[int, str, list[Entry]]]:
        """Step, key and objects of each step's folder, in the order of the steps."""
        folders: dict[str, list[Entry]] = {}
        for entry in self.storage.list(f"{self.prefix}/step-"):
            name = entry.key.removeprefix(f"{self.prefix}/").partition("/")[0]
            folders.setdefault(name, []).append(entry)
        steps = {}
        for name, entries in folders.items():
            if match := _STEP.fullmatch(name):
                steps[int(match[1])] = entries
        return [(step, self._key(step), steps[step]) for step in sorted(steps)]

    def _folders(self) -> list[tuple[str, Commit | None]]:
        """The key of each step's folder, in the order of the steps, with its commit if it has one."""
        return [(key, _commit(step, key, entries)) for step, key, entries in self._steps()]

    def _damaged(self) -> set[str]:
        """The keys of the folders of damaged checkpoints."""
        parent = f"{self.prefix}/damaged/"
        return {parent + entry.key.removeprefix(parent).partition("/")[0] for entry in self.storage.list(parent)}

    def _publish(self, step: int, manifest: _Manifest) -> Commit:
        """Create `COMMITTED`, which makes the checkpoint visible. `StoreError` if another writer created it."""
        key = self._key(step)
        digest = hashlib.sha256(manifest.encoded()).hexdigest().encode()
        created = self.storage.create(f"{key}/{_COMMITTED}", digest)
        commit = _commit(step, key, self._entries(key))
        if commit is None or not (created or self.storage.read(f"{key}/{_COMMITTED}") == digest):
            raise StoreError(f"{self.storage.url}/{key}: another writer is at work on this step; this one stops here")
        return commit

    def _check_same_files(self, existing: Commit, manifest: _Manifest) -> None:
        """`StoreError` unless an existing commit has the files of `manifest`."""
        stored = self._manifest(existing)
        if isinstance(stored, Corruption) or stored.files != manifest.files:
            raise StoreError(
                f"{self.storage.url}/{existing.key}: this step is committed already, whole, with other files than "
                "these: the run did not repeat itself exactly. Use another name for the run"
            )

    def _quarantine(self, commit: Commit) -> None:
        """Move a damaged checkpoint to `damaged/`.

        `COMMITTED` is moved last: after a crash in between, the rest is still a damaged commit and is moved next time.
        """
        existing = self._damaged()
        number = 1
        while (target := f"{self.prefix}/damaged/{commit.name}-{number}") in existing:
            number += 1
        names = sorted(self._sizes(commit.key), key=lambda name: name == _COMMITTED)
        for name in names:
            self.storage.move(f"{commit.key}/{name}", f"{target}/{name}")

    def _remove(self, commit: Commit) -> None:
        """Delete a checkpoint, `COMMITTED` first."""
        self.storage.delete([f"{commit.key}/{_COMMITTED}"])
        self.storage.delete([entry.key for entry in self._entries(commit.key)])

    def _manifest(self, commit: Commit) -> _Manifest | Corruption:
        """The manifest of a commit, verified by `COMMITTED`, or what is wrong with it."""
        try:
            data = self.storage.read(f"{commit.key}/{_MANIFEST}")
            digest = self.storage.read(f"{commit.key}/{_COMMITTED}")
        except FileNotFoundError:
            return Corruption(commit.name, _MANIFEST, "missing")
        except IntegrityError as error:
            return Corruption(commit.name, _MANIFEST, str(error))
        if hashlib.sha256(data).hexdigest().encode() != digest:
            return Corruption(commit.name, _MANIFEST, f"sha256 differs from {_COMMITTED}")
        try:
            manifest = _Manifest.model_validate_json(data)
            for name in manifest.files:
                check_key(name)
        except (ValidationError, UserError):
            return Corruption(commit.name, _MANIFEST, "not a manifest of this version of Poise")
        return manifest

    def _compare(
        self, commit: Commit, sha256: Callable[[str], str] | None, names: Collection[str] | None = None
    ) -> list[Corruption]:
        """The problems of a checkpoint by its manifest; without `sha256`, a function of the file, by size alone.

        `names`: the files to compare, by default all.
        """
        manifest = self._manifest(commit)
        if isinstance(manifest, Corruption):
            return [manifest]
        files = manifest.files
        if names is not None:
            if unknown := sorted(set(names) - files.keys()):
                return [Corruption(commit.name, unknown[0], "missing")]
            files = {name: files[name] for name in names}
        return check_files(commit.name, files, self._sizes(commit.key), sha256)

    def _fetch(self, commit: Commit, into: Path, names: Collection[str] | None = None) -> list[Corruption]:
        """Download a checkpoint to `into` and return its problems; if there are any, `into` is removed."""
        if into.exists() and any(into.iterdir()):
            raise UserError(f"{into} is not empty: fetch a checkpoint to a new folder")

        def download(name: str) -> str:
            self.storage.download(f"{commit.key}/{name}", into / name)
            return sha256_of(into / name)

        with ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, into, ignore_errors=True)
            problems = self._compare(commit, download, names)
            if not problems:
                cleanup.pop_all()
        return problems


def _no_check() -> None:
    """The default of `check_lease`."""


def _new_manifest(step: int, folder: Path, info: dict[str, Any], appended: Mapping[str, FileRecord]) -> _Manifest:
    """The manifest of a local folder; `UserError` for a folder that cannot be committed as `step`."""
    if not 0 <= step < 10**12:
        raise UserError(f"a step is a number from 0 to 999999999999, not {step}")
    files = records_of(folder)
    if not files:
        raise UserError(f"{folder} has no file: there is nothing to commit as step {step}")
    if reserved := {_MANIFEST, _COMMITTED} & set(files):
        raise UserError(f"{folder} has a file {min(reserved)}: in a checkpoint the store uses that name; rename it")
    return _Manifest(step=step, files=files, info=info, appended=dict(appended))


def _commit(step: int, key: str, entries: list[Entry]) -> Commit | None:
    """The commit of the folder `key` with these objects; None if `COMMITTED` is not among them."""
    times = [entry.modified for entry in entries if entry.key == f"{key}/{_COMMITTED}"]
    if not times:
        return None
    size = sum(entry.size for entry in entries)
    return Commit(step, key, size, times[0])


def _incomplete(key: str) -> Corruption:
    """The problem of a folder without `COMMITTED`."""
    return Corruption(key.rpartition("/")[2], _COMMITTED, "missing: the upload was not finished")
