"""The inputs of a run besides its spec: files, other runs and code. They are recorded at its start and then compared.

A run is one experiment. If the model folder, the data or the code were replaced between two starts, the run would mix
two experiments: half of the samples of one model, half of another. So `inputs.json` holds the size, time and SHA-256 of
every file that the run reads, and a start with other files is refused.

A large file is hashed when the record is made, and again only when its size or time has changed. An object on S3 is
identified by its ETag, another run by the hashes in its manifest and its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from pydantic import Field, TypeAdapter, ValidationError

from poise.errors import IntegrityError, StoreError, UserError
from poise.spec import Input, RunSpec, SpecModel, all_inputs
from poise.spec.code import code_files, package_files
from poise.store.folder import FolderStorage
from poise.store.hashes import LARGE, cached_sha256
from poise.store.result import RESULT, parts_of
from poise.store.runs import Run, open_run
from poise.store.storage import Entry, Storage, open_storage

__all__ = ["InputRecord", "check_inputs", "has_results", "input_files", "read_inputs", "record_inputs"]

INPUTS = "inputs.json"
_SILENT_S = 2.0
"""Seconds of reading inputs after which a note is shown."""

_RESULTS = ("checkpoints/", "samples/", "metrics/", "artifacts/", RESULT)


class InputRecord(SpecModel):
    """One file, run or module that a run has read."""

    where: str = Field(description="path of the field of the spec that names the input, such as data.root")
    place: str = Field(description="value of that field")
    file: str = Field(description="name of the file below `place`; empty for another run")
    bytes: int | None = Field(None, description="size of the file")
    modified: float | None = Field(None, description="when the file was last modified (epoch s)")
    sha256: str | None = Field(
        None, description="SHA-256 of the file, or of the hashes of all results of the other run"
    )
    etag: str | None = Field(None, description="ETag of an object on S3")

    @property
    def key(self) -> tuple[str, str, str]:
        """The identity of the input in its run. `place` is part of it, since trials may differ in one field."""
        return self.where, self.place, self.file

    def agrees(self, other: InputRecord) -> bool:
        """Whether both records are of the same bytes, by the strongest property that both have."""
        if self.bytes != other.bytes:
            return False
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        if self.etag and other.etag:
            return self.etag == other.etag
        return self.modified == other.modified

    def __str__(self) -> str:
        facts = [] if self.bytes is None else [f"{self.bytes:,} bytes"]
        if self.sha256 or self.etag:
            facts.append(f"sha256 {self.sha256[:12]}" if self.sha256 else f"ETag {self.etag}")
        return ", ".join(facts)


_Key = tuple[str, str, str]
_RECORDS = TypeAdapter(list[InputRecord])


def record_inputs(
    run: Run,
    spec: RunSpec,
    *,
    committed: bool | None = None,
    lenient: bool = False,
    note: Callable[[str], None] | None = None,
) -> None:
    """Record the inputs of the run, or compare them with the record. The caller holds the lease.

    If the run has committed nothing, its record is replaced, since no result depends on it. `committed` says whether it
    has; None: find out from its files. `lenient` skips inputs that cannot be reached from this machine. `note` shows a
    line if reading takes long.

    Raises:
        UserError: an input differs from the record; the message names every such file.
    """
    recorded = read_inputs(run)
    if recorded and not (has_results(run) if committed is None else committed):
        recorded = {}
    current = _current(spec, recorded, lenient=lenient, note=note)
    _check_unchanged(run, _differences(recorded, current))
    merged = {**recorded, **{record.key: record for record in current}}
    # unchanged records are not written, so that a finished run stays as it is
    if merged != read_inputs(run):
        records = [record for _, record in sorted(merged.items())]
        run.write(INPUTS, _RECORDS.dump_json(records, indent=1, exclude_none=True))


def check_inputs(run: Run, spec: RunSpec, *, code_only: bool = False) -> None:
    """Compare the present inputs with the record of a run, and change nothing. Skips inputs that no longer exist.

    With `code_only`, only code of the user and of installed packages is compared.

    Raises:
        UserError: as `record_inputs`.
    """
    recorded = read_inputs(run)
    if recorded:
        current = _current(spec, recorded, lenient=True, code_only=code_only)
        present = {record.key: recorded[record.key] for record in current if record.key in recorded}
        _check_unchanged(run, _differences(present, current))


def read_inputs(run: Run) -> dict[_Key, InputRecord]:
    """The recorded inputs of a run, by their keys; empty if there is no record."""
    try:
        records = _RECORDS.validate_json(run.read(INPUTS))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise IntegrityError(
            f"{run.url}/{INPUTS} is damaged ({error.errors()[0]['msg']}): remove that one file and run again; what the "
            "run has read is then recorded anew, and not compared"
        ) from error
    return {record.key: record for record in records}


def input_files(place: str, pattern: str) -> tuple[Storage, list[Entry]]:
    """The storage of a place that a spec names, and the files there; see `Input`.

    Raises:
        StoreError: a folder or a bucket that cannot be read.
    """
    if pattern:
        storage = open_storage(place)
        return storage, [entry for entry in storage.list("") if re.fullmatch(pattern, entry.key)]
    folder, _, name = place.rpartition("/")
    storage = open_storage(folder or ("/" if place.startswith("/") else "."))
    return storage, [entry for entry in storage.list(name) if entry.key == name]


def _current(
    spec: RunSpec,
    recorded: Mapping[_Key, InputRecord],
    *,
    lenient: bool,
    code_only: bool = False,
    note: Callable[[str], None] | None = None,
) -> list[InputRecord]:
    """The records of the present inputs. A place without files has none: reading it later raises the error."""
    current: dict[_Key, InputRecord] = {}
    for each in all_inputs(spec):
        if code_only and each.kind not in ("code", "plugin"):
            continue
        try:
            records = list(_identify(each, spec.store, recorded, note))
        except (StoreError, UserError):
            if not lenient:
                raise
            continue
        current.update({record.key: record for record in records})
    return list(current.values())


def _identify(
    each: Input, store: str, recorded: Mapping[_Key, InputRecord], note: Callable[[str], None] | None
) -> Iterator[InputRecord]:
    """The records of one input: of another run, of the files of a module, or of the files at a place."""
    if each.kind == "run":
        if digest := _run_sha256(open_run(store, each.place)):
            yield InputRecord(where=each.where, place=each.place, file="", sha256=digest)
    elif each.kind in ("code", "plugin"):
        files = code_files(each.place) if each.kind == "code" else package_files(each.modules)
        for name, path in sorted(files.items()):
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            yield InputRecord(where=each.where, place=each.place, file=name, bytes=len(data), sha256=digest)
    else:
        storage, entries = input_files(each.place, each.pattern)
        with _slow_read_notes(sum(entry.size for entry in entries), each, note):
            for entry in entries:
                yield _file(each, storage, entry, recorded.get((each.where, each.place, entry.key)))


@contextmanager
def _slow_read_notes(size: int, each: Input, note: Callable[[str], None] | None) -> Iterator[None]:
    """If the block takes long, show a note while `size` bytes are read, and another with the speed at its end."""
    if note is None:
        yield
        return
    amount = f"{size / 1e9:.1f} GB of inputs ({each.where})"
    timer = threading.Timer(_SILENT_S, note, [f"reading {amount} to record what the run depends on"])
    timer.daemon = True
    started = time.monotonic()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - started) > _SILENT_S:
        note(f"read {amount} in {seconds:.0f} s, {size / seconds / 1e6:,.0f} MB/s")


def _file(each: Input, storage: Storage, entry: Entry, recorded: InputRecord | None) -> InputRecord:
    """The record of a file. Takes the hash of a large file from `recorded` if size and time are the same."""
    record = InputRecord(
        where=each.where,
        place=each.place,
        file=entry.key,
        bytes=entry.size,
        modified=entry.modified,
        etag=entry.etag or None,
    )
    if not isinstance(storage, FolderStorage):
        return record
    is_unchanged = recorded is not None and (recorded.bytes, recorded.modified) == (entry.size, entry.modified)
    if recorded is not None and is_unchanged and entry.size >= LARGE:
        return record.model_copy(update={"sha256": recorded.sha256})
    return record.model_copy(update={"sha256": cached_sha256(storage.root / entry.key)})


def _run_sha256(run: Run) -> str:
    """One hash of a run's spec, results and checkpoints; empty if there is no such run.

    The hash of a sweep includes those of its trials, whose results are not in its own.
    """
    manifest = run.manifest()
    commits = [run.read(f"checkpoints/{commit.name}/COMMITTED").decode() for commit in run.checkpoints.commits()]
    if manifest is None and not commits:
        return ""
    files = manifest.files if manifest else {}
    results = {}
    for name, record in sorted(files.items()):
        # A page may be rendered again at any time.
        if name.startswith(("artifacts/", RESULT)) and not name.endswith(".html"):
            results[name] = record.sha256
    parts = [_run_sha256(Run(run.storage, part)) for part in parts_of(run)]
    facts = [manifest.spec_sha256 if manifest else "", results, commits, parts]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def has_results(run: Run) -> bool:
    """Whether the run has any file that depends on its inputs."""
    return any(run.files(prefix) for prefix in _RESULTS)


def _differences(recorded: Mapping[_Key, InputRecord], current: Sequence[InputRecord]) -> list[str]:
    """A line for each input that is new, has changed or is gone.

    A recorded place of which no file is present gives no line: reading it later raises the error.
    """
    lines = []
    recorded_places = {(where, place) for where, place, _ in recorded}
    for record in current:
        before = recorded.get(record.key)
        name = _describe(record)
        if before is None and (record.where, record.place) in recorded_places:
            lines.append(f"{name} is new")
        elif before is not None and not before.agrees(record):
            lines.append(f"{name} has changed: {before} when the run began, {record} now")
    current_keys = {record.key for record in current}
    current_places = {(record.where, record.place) for record in current}
    for key, record in recorded.items():
        if key[:2] in current_places and key not in current_keys:
            lines.append(f"{_describe(record)} is gone")
    return sorted(lines)


def _describe(record: InputRecord) -> str:
    """An input for a message, such as `data.root: /data/train.parquet`."""
    if not record.file:
        return f"{record.where}: run {record.place!r}"
    is_code = record.modified is None
    if is_code:
        return f"{record.where}: {record.file}"
    if record.place == record.file or record.place.endswith(f"/{record.file}"):
        return f"{record.where}: {record.place}"
    return f"{record.where}: {record.place}/{record.file}"


def _check_unchanged(run: Run, changes: Sequence[str]) -> None:
    """UserError if there are changes; the message has the first ten."""
    if changes:
        lines = list(changes[:10])
        if len(changes) > 10:
            lines.append(f"and {len(changes) - 10} more")
        raise UserError(
            f"run {run.name!r} in {run.storage.url} was begun with other inputs than there are now:\n  "
            + "\n  ".join(lines)
            + "\nput back what it was begun with, or give the run another name, as in --set name="
            + f"{run.name}-2: results of two inputs are never mixed under one name"
        )
