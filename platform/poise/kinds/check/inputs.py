"""Checks of the runs and functions that a spec names, and of the folder of its store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from poise.errors import PoiseError, UserError
from poise.kinds.check.field_error import FieldError
from poise.spec import Input, RunSpec
from poise.spec.code import attributes
from poise.spec.problems import nearest
from poise.store.result import has_result
from poise.store.runs import open_run, wrong_kind

__all__ = ["input_errors", "why_not_writable"]


def input_errors(named: Input, spec: RunSpec, earlier_kinds: Mapping[str, str]) -> Iterator[FieldError]:
    """What is wrong with a run or a function that a spec names; other inputs are checked by section.

    `earlier_kinds`: by name, the kind of each run that an earlier stage of the pipeline makes.
    """
    if named.kind == "run":
        yield from _run_errors(named, spec, earlier_kinds)
    elif named.kind == "code":
        yield from _code_errors(named)


def _run_errors(named: Input, spec: RunSpec, earlier_kinds: Mapping[str, str]) -> Iterator[FieldError]:
    if named.place in earlier_kinds:
        yield from _kind_errors(named, earlier_kinds[named.place])
        return
    is_earlier_trial = named.place.rpartition("-")[0] in earlier_kinds  # of a sweep, whose trials are NAME-0000, ...
    if "://" in spec.store or is_earlier_trial:
        return
    try:
        run = open_run(spec.store, named.place, must_exist=True)
        manifest = run.manifest()
    except PoiseError as error:
        yield FieldError(named.path, f"{error}", absent=isinstance(error, UserError))
        return
    if manifest is not None:
        yield from _kind_errors(named, manifest.kind)
    if not has_result(run):
        status = run.summary().status
        message = f"run {named.place!r} has no result yet, it is {status}: run it to its end first"
        yield FieldError(named.path, message)


def _kind_errors(named: Input, kind: str) -> Iterator[FieldError]:
    """A run of the wrong kind. `kind` is that of the run; for a sweep it may be such as "sweep of robust.train"."""
    head, _, trial_kind = kind.partition(" of ")
    is_accepted = head in named.kinds and (not trial_kind or trial_kind in named.kinds)
    if named.kinds and not is_accepted:
        yield FieldError(named.path, wrong_kind(named.place, kind, named.kinds))


def _code_errors(named: Input) -> Iterator[FieldError]:
    module, _, name = named.place.partition(":")
    try:
        names = attributes(named.place)
    except UserError as error:
        yield FieldError(named.path, str(error), absent="there is no module" in str(error))
        return
    if names is not None and name not in names:
        yield FieldError(named.path, f"module {module!r} defines no {name!r}; {nearest(name, names)}")


def why_not_writable(folder: Path) -> str | None:
    """Why a folder cannot be created; None where it exists or can be created.

    An unnamed file is opened in the nearest folder that exists. Permissions alone are not enough: root passes all of
    them, and some file systems accept no files, such as /proc.
    """
    if os.path.isdir(folder):  # unlike Path.is_dir, it does not raise where access is refused
        return None
    parent = next(ancestor for ancestor in folder.parents if os.path.exists(ancestor))
    if not os.path.isdir(parent):
        return f"{parent} is a file, not a folder"
    try:
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return f"{parent}: {error.strerror}"
