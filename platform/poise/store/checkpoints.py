"""Checkpoints that are either committed and whole, or not trusted.

A checkpoint is the folder `step-00000040/`: its files, `manifest.json` with the size and SHA-256 of each, and last
`COMMITTED`, created conditionally and holding the SHA-256 of the manifest. Readers trust only what `COMMITTED` vouches
for, and verify it. One order keeps that true through a crash at any point: `COMMITTED` is the last object of a
checkpoint to appear and the first to go.
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

from poise.errors import DamagedError, StoreError, UserError
from poise.spec import Section
from poise.store.records import Damage, FileRecord, check_files, listed, records_of
from poise.store.storage import Entry, Storage, check_key, sha256_of

__all__ = ["Checkpoints", "Commit"]

_MANIFEST, _COMMITTED = "manifest.json", "COMMITTED"
_STEP = re.compile(r"step-(\d{8,12})")


@dataclass(frozen=True, order=True)
class Commit:
    """A committed checkpoint: its step, the key of its folder, its size in bytes, when it was committed (epoch s)."""

    step: int
    key: str
    size: int
    committed: float

    @property
    def name(self) -> str:
        """The name of its folder, such as `step-00000040`."""
        return self.key.rpartition("/")[2]


class _Manifest(Section):
    step: int
    files: dict[str, FileRecord]
    info: dict[str, Any]
    appended: dict[str, FileRecord] = Field(default={})

    def encoded(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()


class Checkpoints:
    """The checkpoints of one run, below `prefix` (no slash at its ends). Whoever writes holds the run's lease."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self.storage = storage
        self.prefix = check_key(prefix)
        self._whole: dict[str, list[Entry]] = {}

    def commit(
        self,
        step: int,
        folder: Path,
        *,
        info: dict[str, Any],
        appended: Mapping[str, FileRecord] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> Commit:
        """Upload every file below a local folder and commit them as the checkpoint of `step`.

        `info` is any JSON object, to be had again from `info()`. `appended` is what the files of the run that only grow
        are now, to be had again from `appended()`: this commit vouches for that beginning of them. `guard` raises if
        this writer may not write any more; it is called before anything is changed and again right before the commit
        becomes visible. A step that is committed already is returned as it is if its files are the same ones, is moved
        to `damaged/` and committed anew if it is damaged, and is a `StoreError` otherwise.
        """
        guard = guard or (lambda: None)
        manifest = _new_manifest(step, folder, info, appended or {})
        key = self._key(step)
        guard()
        entries = self._entries(key)
        if existing := _commit(step, key, entries):
            if not self.examine(existing):
                return self._agreeing(existing, manifest)
            self._set_aside(existing)
        else:
            self.storage.delete([entry.key for entry in entries])
        for name in manifest.files:
            self.storage.upload(folder / name, f"{key}/{name}")
        self.storage.write(f"{key}/{_MANIFEST}", manifest.encoded())
        if problems := check_files(key, manifest.files, self._sizes(key)):
            raise DamagedError(f"{self.storage.url}: the upload arrived damaged: {listed(problems)}: run again")
        guard()
        return self._seal(step, manifest)

    def commits(self) -> list[Commit]:
        """What is committed, oldest first. The files are not looked at."""
        return [commit for _, commit in self._folders() if commit]

    def at(self, step: int) -> Commit:
        """The commit of `step`; `DamagedError` if there is none any more."""
        commit = _commit(step, self._key(step), self._entries(self._key(step)))
        if commit is None:
            raise DamagedError(f"{self.storage.url}/{self._key(step)}: the checkpoint of step {step} is not there")
        return commit

    def info(self, commit: Commit) -> dict[str, Any]:
        """What was given to `commit` as `info`; `DamagedError` if the manifest cannot be trusted."""
        manifest = self._manifest(commit)
        if isinstance(manifest, Damage):
            raise DamagedError(f"{self.storage.url}: {manifest}")
        return manifest.info

    def appended(self) -> tuple[Commit | None, dict[str, FileRecord]]:
        """The newest commit whose manifest can be trusted, and what the files that only grow were by then."""
        for commit in reversed(self.commits()):
            manifest = self._manifest(commit)
            if not isinstance(manifest, Damage):
                return commit, manifest.appended
        return None, {}

    def fetch(self, commit: Commit, into: Path) -> Path:
        """Download a checkpoint to `into`, a folder that is new or empty, and verify every byte.

        Raises `DamagedError` that names each bad file and what is wrong with it, and then leaves nothing in `into`.
        """
        if problems := self._fetch(commit, into):
            raise DamagedError(f"{self.storage.url}: the checkpoint is damaged: {listed(problems)}")
        return into

    def newest_sound(self, into: Path) -> tuple[Commit | None, list[Damage]]:
        """Fetch the newest checkpoint that is whole to `into`; also, what is newer and why it is not used.

        `into` is new or empty and stays so when no checkpoint is whole. Nothing in the store is deleted.
        """
        skipped: list[Damage] = []
        for key, commit in reversed(self._folders()):
            problems = self._fetch(commit, into) if commit else [_half_written(key)]
            if commit and not problems:
                return commit, skipped
            skipped += problems
        return None, skipped

    def examine(self, commit: Commit) -> list[Damage]:
        """Read every byte of a checkpoint where it is, and say what is wrong."""
        return self._compare(commit, lambda name: self.storage.sha256(f"{commit.key}/{name}"))

    def verify(self) -> list[Damage]:
        """Examine every checkpoint, oldest first; half-written uploads are named too."""
        found = [self.examine(commit) if commit else [_half_written(key)] for key, commit in self._folders()]
        return [damage for damages in found for damage in damages]

    def prune(self, keep: int, protect: Collection[int] = ()) -> list[int]:
        """Remove what is older than the `keep` newest commits that have all their bytes, but for steps in `protect`.

        Returns the steps removed. A commit that lacks bytes does not count, so nothing goes on its account. One that
        was found whole is compared again only if the list of its objects has changed, so that the number of requests
        does not depend on `keep`.
        """
        if keep < 1:
            raise UserError(f"at least 1 checkpoint has to be kept, not {keep}")
        whole, removed, known = 0, [], self._whole
        self._whole = {}
        for step, key, entries in reversed(self._steps()):
            commit = _commit(step, key, entries)
            if commit is None:
                continue
            if whole < keep:
                if known.get(key) == entries or not self._compare(commit, None):
                    self._whole[key] = entries
                    whole += 1
            elif step not in protect:
                self._remove(commit)
                removed.append(step)
        return removed

    def remove(self, step: int) -> None:
        """Remove the commit of `step`, if there is one."""
        if commit := _commit(step, self._key(step), self._entries(self._key(step))):
            self._remove(commit)

    def sweep(self, older_than_s: float) -> list[str]:
        """Remove half-written uploads and what was set aside as damaged, if last touched longer ago than this (s).

        Returns the keys of the folders removed. The age exceeds the longest upload, unless the caller holds the lease.
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
        """Step, key and objects of the folder of every step, by step."""
        folders: dict[str, list[Entry]] = {}
        for entry in self.storage.list(f"{self.prefix}/step-"):
            name = entry.key.removeprefix(f"{self.prefix}/").partition("/")[0]
            folders.setdefault(name, []).append(entry)
        steps = {int(match[1]): folders[name] for name in folders if (match := _STEP.fullmatch(name))}
        return [(step, self._key(step), steps[step]) for step in sorted(steps)]

    def _folders(self) -> list[tuple[str, Commit | None]]:
        """The folder of every step, by step, with its commit if it has one."""
        return [(key, _commit(step, key, entries)) for step, key, entries in self._steps()]

    def _damaged(self) -> set[str]:
        place = f"{self.prefix}/damaged/"
        return {place + entry.key.removeprefix(place).partition("/")[0] for entry in self.storage.list(place)}

    def _seal(self, step: int, manifest: _Manifest) -> Commit:
        key = self._key(step)
        vouched = hashlib.sha256(manifest.encoded()).hexdigest().encode()
        created = self.storage.create(f"{key}/{_COMMITTED}", vouched)
        commit = _commit(step, key, self._entries(key))
        if commit is None or not (created or self.storage.read(f"{key}/{_COMMITTED}") == vouched):
            raise StoreError(f"{self.storage.url}/{key}: another writer is at work on this step; this one stops here")
        return commit

    def _agreeing(self, existing: Commit, manifest: _Manifest) -> Commit:
        stored = self._manifest(existing)
        if isinstance(stored, Damage) or stored.files != manifest.files:
            raise StoreError(
                f"{self.storage.url}/{existing.key}: this step is committed already, whole, with other files than "
                "these: the run did not repeat itself exactly. Use another name for the run"
            )
        return existing

    def _set_aside(self, commit: Commit) -> None:
        """Move a damaged checkpoint out of the way: COMMITTED last, so that a crash leaves what is moved next time."""
        taken, number = self._damaged(), 1
        while (aside := f"{self.prefix}/damaged/{commit.name}-{number}") in taken:
            number += 1
        names = sorted(self._sizes(commit.key), key=lambda name: name == _COMMITTED)
        for name in names:
            self.storage.move(f"{commit.key}/{name}", f"{aside}/{name}")

    def _remove(self, commit: Commit) -> None:
        self.storage.delete([f"{commit.key}/{_COMMITTED}"])
        self.storage.delete([entry.key for entry in self._entries(commit.key)])

    def _manifest(self, commit: Commit) -> _Manifest | Damage:
        try:
            data = self.storage.read(f"{commit.key}/{_MANIFEST}")
            vouched = self.storage.read(f"{commit.key}/{_COMMITTED}")
        except FileNotFoundError:
            return Damage(commit.name, _MANIFEST, "missing")
        except DamagedError as error:
            return Damage(commit.name, _MANIFEST, str(error))
        if hashlib.sha256(data).hexdigest().encode() != vouched:
            return Damage(commit.name, _MANIFEST, f"sha256 differs from {_COMMITTED}")
        try:
            manifest = _Manifest.model_validate_json(data)
            for name in manifest.files:
                check_key(name)
        except (ValidationError, UserError):
            return Damage(commit.name, _MANIFEST, "not a manifest of this version of Poise")
        return manifest

    def _compare(self, commit: Commit, sha256: Callable[[str], str] | None) -> list[Damage]:
        manifest = self._manifest(commit)
        if isinstance(manifest, Damage):
            return [manifest]
        return check_files(commit.name, manifest.files, self._sizes(commit.key), sha256)

    def _fetch(self, commit: Commit, into: Path) -> list[Damage]:
        if into.exists() and any(into.iterdir()):
            raise UserError(f"{into} is not empty: fetch a checkpoint to a new folder")

        def fetched(name: str) -> str:
            self.storage.download(f"{commit.key}/{name}", into / name)
            return sha256_of(into / name)

        with ExitStack() as undo:
            undo.callback(shutil.rmtree, into, ignore_errors=True)
            problems = self._compare(commit, fetched)
            if not problems:
                undo.pop_all()
        return problems


def _new_manifest(step: int, folder: Path, info: dict[str, Any], appended: Mapping[str, FileRecord]) -> _Manifest:
    if not 0 <= step < 10**12:
        raise UserError(f"a step is a number from 0 to 999999999999, not {step}")
    files = records_of(folder)
    if not files:
        raise UserError(f"{folder} has no file: there is nothing to commit as step {step}")
    if taken := {_MANIFEST, _COMMITTED} & set(files):
        raise UserError(f"{folder} has a file {min(taken)}: in a checkpoint that name is the store's own")
    return _Manifest(step=step, files=files, info=info, appended=dict(appended))


def _commit(step: int, key: str, entries: list[Entry]) -> Commit | None:
    """The commit that these objects of folder `key` are, or None while there is no `COMMITTED` among them."""
    marks = [entry.modified for entry in entries if entry.key == f"{key}/{_COMMITTED}"]
    return Commit(step, key, sum(entry.size for entry in entries), marks[0]) if marks else None


def _half_written(key: str) -> Damage:
    return Damage(key.rpartition("/")[2], _COMMITTED, "missing: the upload was not finished")
