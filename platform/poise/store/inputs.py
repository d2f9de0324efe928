"""What a run has read besides its spec: files, other runs and code, recorded when it starts and compared ever after.

A run is one experiment. If the model folder, the data or the code behind its spec is replaced between two starts, the
run would mix two experiments: half of the samples of one model, half of another. So `inputs.json` of a run holds size,
time and SHA-256 of every file that it reads, and a start that meets other files is refused.

A large file is hashed when the record is made, and again only when its size or time has changed. Objects on S3 are
known by their ETag. The outputs of another run are known by what its manifest and its checkpoints vouch for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from pydantic import Field, TypeAdapter, ValidationError

from poise.errors import DamagedError, StoreError, UserError
from poise.spec import Input, RunSpec, Section
from poise.spec.code import code_files
from poise.store.folder import FolderStorage
from poise.store.hashes import LARGE, cached_sha256
from poise.store.runs import Run, open_run
from poise.store.storage import Entry, Storage, open_storage

__all__ = ["InputRecord", "check_inputs", "has_results", "input_files", "read_inputs", "record_inputs"]

INPUTS = "inputs.json"
_SILENT_S = 2.0
"""Seconds after which it is said that inputs are read."""

_RESULTS = ("checkpoints/", "samples/", "metrics/", "artifacts/")


class InputRecord(Section):
    """One file, run or module that a run has read."""

    where: str = Field(description="what names it in the spec, such as data.root")
    place: str = Field(description="what is written there")
    file: str = Field(description="name of the file below that place; empty for another run")
    bytes: int | None = Field(None, description="size of the file")
    modified: float | None = Field(None, description="when the file was last modified (epoch s)")
    sha256: str | None = Field(None, description="of the file, or of all that the other run has left")
    etag: str | None = Field(None, description="of an object on S3")

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others of a run; the trials of a sweep may name several places at one path."""
        return self.where, self.place, self.file

    def agrees(self, other: InputRecord) -> bool:
        """Whether both are of the same bytes, as far as both know them."""
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
    """Record what the run reads, or compare it with what is recorded. Only who holds the lease does.

    A run that has committed nothing has read nothing that counts: its record is made anew. `committed` says whether
    it has; by default its own files are looked at. `lenient` passes over what cannot be reached from this machine.
    `note` shows a line where reading takes long.

    Raises:
        UserError: an input is not the one that the run has begun with; every file is named.
    """
    known = read_inputs(run)
    if known and not (has_results(run) if committed is None else committed):
        known = {}
    found = _current(spec, known, lenient=lenient, note=note)
    _refuse(run, _differences(known, found))
    both = {**known, **{record.key: record for record in found}}
    if both != read_inputs(run):
        records = [record for _, record in sorted(both.items())]
        run.write(INPUTS, _RECORDS.dump_json(records, indent=1, exclude_none=True))


def check_inputs(run: Run, spec: RunSpec) -> None:
    """Compare what is there now with the record of a run, and change nothing. What is gone by now is passed over.

    Raises:
        UserError: as `record_inputs`.
    """
    known = read_inputs(run)
    if known:
        found = _current(spec, known, lenient=True)
        _refuse(run, _differences({record.key: known[record.key] for record in found if record.key in known}, found))


def read_inputs(run: Run) -> dict[_Key, InputRecord]:
    """The record of a run, by place in the spec and file; empty where there is none."""
    try:
        records = _RECORDS.validate_json(run.read(INPUTS))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise DamagedError(
            f"{run.url}/{INPUTS} is damaged ({error.errors()[0]['msg']}): remove that one file and run again; what the "
            "run has read is then recorded anew, and not compared"
        ) from error
    return {record.key: record for record in records}


def input_files(place: str, pattern: str) -> tuple[Storage, list[Entry]]:
    """The files at a place that a spec names, and the storage they lie in; see `Input`.

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
    spec: RunSpec, known: Mapping[_Key, InputRecord], *, lenient: bool, note: Callable[[str], None] | None = None
) -> list[InputRecord]:
    """What is there now, place by place; a place that holds nothing is left to whoever reads it."""
    found: dict[_Key, InputRecord] = {}
    for each in dict.fromkeys(spec.inputs()):
        try:
            records = list(_identify(each, spec.store, known, note))
        except (StoreError, UserError):
            if not lenient:
                raise
            continue
        found.update({record.key: record for record in records})
    return list(found.values())


def _identify(
    each: Input, store: str, known: Mapping[_Key, InputRecord], note: Callable[[str], None] | None
) -> Iterator[InputRecord]:
    if each.kind == "run":
        if digest := _run_sha256(open_run(store, each.place)):
            yield InputRecord(where=each.where, place=each.place, file="", sha256=digest)
    elif each.kind == "code":
        for name, path in sorted(code_files(each.place).items()):
            digest = hashlib.sha256(data := path.read_bytes()).hexdigest()
            yield InputRecord(where=each.where, place=each.place, file=name, bytes=len(data), sha256=digest)
    else:
        storage, entries = input_files(each.place, each.pattern)
        with _announced(sum(entry.size for entry in entries), each, note):
            for entry in entries:
                yield _file(each, storage, entry, known.get((each.where, each.place, entry.key)))


@contextmanager
def _announced(size: int, each: Input, note: Callable[[str], None] | None) -> Iterator[None]:
    """Say what is read once that has taken a while, and at the end how fast it was."""
    if note is None:
        yield
        return
    shown = f"{size / 1e9:.1f} GB of inputs ({each.where})"
    timer = threading.Timer(_SILENT_S, note, [f"reading {shown} to record what the run depends on"])
    timer.daemon = True
    started = time.monotonic()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - started) > _SILENT_S:
        note(f"read {shown} in {seconds:.0f} s, {size / seconds / 1e6:,.0f} MB/s")


def _file(each: Input, storage: Storage, entry: Entry, known: InputRecord | None) -> InputRecord:
    """The record of a file. The hash of a large one whose size and time are those recorded is taken from there."""
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
    unchanged = known is not None and (known.bytes, known.modified) == (entry.size, entry.modified)
    if known is not None and unchanged and entry.size >= LARGE:
        return record.model_copy(update={"sha256": known.sha256})
    return record.model_copy(update={"sha256": cached_sha256(storage.root / entry.key)})


def _run_sha256(run: Run) -> str:
    """One hash of all that a run vouches for: its spec, its results, its checkpoints. Empty where there is no such run.

    A sweep stands for its trials, whose results its own do not contain.
    """
    manifest = run.manifest()
    commits = [run.read(f"checkpoints/{commit.name}/COMMITTED").decode() for commit in run.checkpoints.commits()]
    if manifest is None and not commits:
        return ""
    files = manifest.files if manifest else {}
    results = {
        name: record.sha256
        for name, record in sorted(files.items())
        if name.startswith("artifacts/") and not name.endswith(".html")
    }
    trials: list[str] = []
    if manifest is not None and manifest.kind == "sweep" and "artifacts/summary.json" in files:
        summary = json.loads(run.read("artifacts/summary.json"))
        trials = [_run_sha256(Run(run.storage, trial["run"])) for trial in summary["trials"]]
    facts = [manifest.spec_sha256 if manifest else "", results, commits, trials]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def has_results(run: Run) -> bool:
    """Whether the run has left anything that its inputs have gone into."""
    return any(run.files(prefix) for prefix in _RESULTS)


def _differences(known: Mapping[_Key, InputRecord], found: Sequence[InputRecord]) -> list[str]:
    """What is not as it was, a line each. A place that cannot be seen at all is left to whoever reads it."""
    lines = []
    seen = {(record.where, record.place) for record in found}
    recorded = {(where, place) for where, place, _ in known}
    for record in found:
        before = known.get(record.key)
        name = _named(record)
        if before is None and (record.where, record.place) in recorded:
            lines.append(f"{name} is new")
        elif before is not None and not before.agrees(record):
            lines.append(f"{name} has changed: {before} when the run began, {record} now")
    present = {record.key for record in found}
    lines += [f"{_named(known[key])} is gone" for key in known if key[:2] in seen and key not in present]
    return sorted(lines)


def _named(record: InputRecord) -> str:
    if not record.file:
        return f"{record.where}: run {record.place!r}"
    is_code = record.modified is None
    if is_code or record.place.endswith(f"/{record.file}"):
        return f"{record.where}: {record.file if is_code else record.place}"
    inside = record.place != record.file
    return f"{record.where}: {record.place}/{record.file}" if inside else f"{record.where}: {record.file}"


def _refuse(run: Run, changes: Iterable[str]) -> None:
    if lines := list(changes):
        shown = [*lines[:10], *([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])]
        raise UserError(
            f"run {run.name!r} in {run.storage.url} was begun with other inputs than there are now:\n  "
            + "\n  ".join(shown)
            + "\nput back what it was begun with, or give the run another name, as in --set name="
            + f"{run.name}-2: results of two inputs are never mixed under one name"
        )
