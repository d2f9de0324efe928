"""Mutual exclusion in a folder that several machines share, without `flock`, which Lustre and some NFS do not have.

A contender creates a file with a unique name in the folder and then lists the files of the others. Of two contenders at
least the one that lists later sees the other, so two never enter together. The first by name waits; the others remove
their files and try again. A file whose process has ended on this machine, or that is older than any change takes, is
ignored and removed; since its name is unique, no other contender's file can be removed by mistake.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from poise.store.process import ProcessId
from poise.store.storage import RESERVED

__all__ = ["CONTENDER", "alone_in"]

CONTENDER = f"{RESERVED}lock-"
_STALE_S = 60.0  # a block takes milliseconds
_RANDOM = random.SystemRandom()  # not the global generator, whose state is part of a checkpoint


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Enter the block only while no other process, on any machine, is in it for the same folder.

    Raises `FileNotFoundError` when the folder does not exist.
    """
    lock_file = folder / f"{CONTENDER}{uuid.uuid4().hex}"
    text = json.dumps(asdict(ProcessId.current()))
    try:
        while True:
            lock_file.write_text(text)
            while (others := _others(lock_file)) and min(others) > lock_file.name:
                _pause(0.005)
            if not others:
                break
            lock_file.unlink(missing_ok=True)
            _pause(0.02)
        yield
    finally:
        lock_file.unlink(missing_ok=True)


def _pause(longest_s: float) -> None:
    time.sleep(_RANDOM.uniform(0.001, longest_s))


def _others(lock_file: Path) -> list[str]:
    """The names of the other contenders' files. Removes those that are stale."""
    contenders = [path for path in lock_file.parent.iterdir() if path.name.startswith(CONTENDER) and path != lock_file]
    alive = []
    for path in contenders:
        with suppress(FileNotFoundError):  # its process removed it in the meantime
            if _is_stale(path, lock_file):
                path.unlink(missing_ok=True)
            else:
                alive.append(path.name)
    return alive


def _is_stale(path: Path, lock_file: Path) -> bool:
    """Whether the file of another contender is too old, or its process has ended on this machine."""
    if lock_file.stat().st_mtime - path.stat().st_mtime > _STALE_S:  # both times are of the file system's clock
        return True
    try:
        holder = ProcessId(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        return False  # its process is writing it at this moment
    return holder.is_gone()
