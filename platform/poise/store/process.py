"""The identity of a process, by which others can find out whether it has ended."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["ProcessId"]

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """A process of some machine.

    `started` is its start in hundredths of a second since boot, which distinguishes it from a later process with the
    same id. `space` is the id of the boot and of the process namespace in which `pid` counts: a container has a
    namespace of its own. `space` is empty on a system without /proc.
    """

    pid: int
    started: int | None
    space: str

    @classmethod
    def current(cls) -> ProcessId:
        """This process."""
        return cls(os.getpid(), _started(os.getpid()), _space())

    def is_gone(self) -> bool:
        """Whether the process is known to have ended: it ran on this machine, and no process is the same."""
        return bool(self.space) and self.space == _space() and _started(self.pid) != self.started


def _started(pid: int) -> int | None:
    """When a process of this machine started, in 1/100 s since boot; None if it has ended or is a zombie."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        # Setting the system clock moves both times, and not their difference.
        seconds: float = process.create_time() - psutil.boot_time()
        return round(100 * seconds)
    except psutil.Error:
        return None


def _space() -> str:
    """The id of the boot and of the process namespace of this process; empty without /proc."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""
