"""Mutual exclusion in a folder that several machines share, without `flock`, which Lustre and some NFS do not have.

Who wants to be alone makes a file of its own in the folder and then looks who else has one. Of two, at least the one
that looks later sees the other, so that two never pass. The first by name waits; the others withdraw and come again. A
file whose process is gone from this machine, or that is older than any change takes, is passed over and removed: it has
a name of its own, so that nothing else can be removed with it.
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
_STALE_S = 60.0  # what is done alone takes milliseconds
_RANDOM = random.SystemRandom()  # the global state is part of a checkpoint


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the only one in this block among all, on any machine, that enter it for the same folder.

    Raises `FileNotFoundError` when there is no such folder.
    """
    own = folder / f"{CONTENDER}{uuid.uuid4().hex}"
    text = json.dumps(asdict(ProcessId.current()))
    try:
        while True:
            own.write_text(text)
            while (others := _others(own)) and min(others) > own.name:
                _pause(0.005)
            if not others:
                break
            own.unlink(missing_ok=True)
            _pause(0.02)
        yield
    finally:
        own.unlink(missing_ok=True)


def _pause(longest_s: float) -> None:
    time.sleep(_RANDOM.uniform(0.001, longest_s))


def _others(own: Path) -> list[str]:
    """The names of all others that want to be alone, or are."""
    contenders = [path for path in own.parent.iterdir() if path.name.startswith(CONTENDER) and path != own]
    alive = []
    for path in contenders:
        with suppress(FileNotFoundError):  # it has left in between
            if _is_stale(path, own):
                path.unlink(missing_ok=True)
            else:
                alive.append(path.name)
    return alive


def _is_stale(path: Path, own: Path) -> bool:
    if own.stat().st_mtime - path.stat().st_mtime > _STALE_S:  # both by the clock of the file system
        return True
    try:
        holder = ProcessId(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        return False  # it is being written
    return holder.is_gone()
