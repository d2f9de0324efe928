"""Who a process is, so that others can tell whether it still lives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProcessId"]

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """A process of some machine.

    `started` are clock ticks since boot, which tell it from a later one of the same number. `space` names the boot and
    the process namespace that give `pid` its meaning; a container shares neither host nor numbers. It is empty where
    there is no /proc to tell.
    """

    pid: int
    started: int | None
    space: str

    @classmethod
    def current(cls) -> ProcessId:
        """This process."""
        return cls(os.getpid(), _started(os.getpid()), _space())

    def is_gone(self) -> bool:
        """Whether it is known to have ended: it ran here, and is not there any more."""
        return bool(self.space) and self.space == _space() and _started(self.pid) != self.started


def _started(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        state, *fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _space() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""
