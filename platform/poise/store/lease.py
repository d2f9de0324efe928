"""A lease on a run's name, so that of two drivers racing for it one wins.

The object `LOCK` says who holds the run. It is only ever created and swapped, never written or deleted, so that every
change of hands is decided by the store. Clocks of hosts that share a store should agree to within `expires_s`; where
they do not, a holder may lose its lease, which it notices, but two never hold it.
"""

from __future__ import annotations

import math
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from types import TracebackType

from pydantic import ValidationError

from poise.errors import RunBusyError, StoreError
from poise.spec import Section
from poise.store.process import ProcessId
from poise.store.storage import Storage

__all__ = ["Lease"]


class _Holder(Section):
    """What LOCK says. A holder that let go has the empty token."""

    token: str
    host: str
    pid: int
    started: int | None
    space: str
    """With `pid`, which process it is: see `ProcessId`."""
    since: float
    renewed: float
    expires_s: float

    def encoded(self) -> bytes:
        return self.model_dump_json(indent=1).encode()

    def is_alive(self) -> bool:
        """Whether it has to be respected: it holds on, renewed in time, and its process is not known to be gone."""
        if not self.token or self.remaining_s() < 0 or self.is_implausible():
            return False
        return not ProcessId(self.pid, self.started, self.space).is_gone()

    def remaining_s(self) -> float:
        """Seconds until it expires unless it is renewed."""
        return self.renewed + self.expires_s - time.time()

    def is_implausible(self) -> bool:
        """Whether it was renewed later than now: the clock there was wrong, or the clock here is."""
        return self.renewed > time.time() + self.expires_s


class Lease:
    """The right to be the one driver of the run below `prefix`; a context manager.

    Renewed by a thread every `renew_s` seconds; one that was not renewed for `expires_s` seconds may be taken over, and
    at once if its process ran on this machine and is gone.
    """

    def __init__(self, storage: Storage, prefix: str, *, renew_s: float = 5.0, expires_s: float = 30.0) -> None:
        self.storage = storage
        self.prefix = prefix
        self.renew_s = renew_s
        self.expires_s = expires_s
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name=f"lease {prefix}", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease, or raise `RunBusyError` that names the holder."""
        self.storage.check_exclusion()
        now = time.time()
        mine = _Holder(
            token=self.token,
            host=socket.gethostname(),
            **asdict(ProcessId.current()),
            since=now,
            renewed=now,
            expires_s=self.expires_s,
        )
        if not self._take(mine):
            raise RunBusyError(self._who_holds())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(self.expires_s)
        with suppress(StoreError):  # a lease that cannot be given back expires
            self._update(token="")

    def check(self) -> None:
        """Raise `RunBusyError` unless the store still names this lease as the holder."""
        if not self.holds(self.storage, self.prefix, self.token):
            raise RunBusyError(f"{self._who_holds()} This driver had it before, and stops here.")

    @staticmethod
    def holds(storage: Storage, prefix: str, token: str) -> bool:
        """Whether the lease on `prefix` is held with this token: what a worker asks before it commits."""
        holder = _read(storage, prefix)[1]
        return holder is not None and holder.token == token != ""

    @staticmethod
    def is_held(storage: Storage, prefix: str) -> bool:
        """Whether some living driver holds the lease on `prefix`."""
        holder = _read(storage, prefix)[1]
        return holder is not None and holder.is_alive()

    def _take(self, mine: _Holder) -> bool:
        if self.storage.create(_key(self.prefix), mine.encoded()):
            return True
        seen, holder = _read(self.storage, self.prefix)
        if holder is not None and (holder.is_alive() or self._is_renewed(holder, seen)):
            return False
        return self.storage.swap(_key(self.prefix), mine.encoded(), seen)

    def _is_renewed(self, holder: _Holder, seen: bytes) -> bool:
        """Whether a holder whose clock cannot be trusted renews its lease: it is watched for as long as one lasts."""
        gone = ProcessId(holder.pid, holder.started, holder.space).is_gone()
        if not holder.token or not holder.is_implausible() or gone:
            return False
        until = time.monotonic() + holder.expires_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self.renew_s))
            if _read(self.storage, self.prefix)[0] != seen:
                return True
        return False

    def _update(self, **changes: str | float) -> bool:
        """Change what LOCK says of this lease; False if it was lost."""
        seen, holder = _read(self.storage, self.prefix)
        if holder is None or holder.token != self.token:
            return False
        return self.storage.swap(_key(self.prefix), holder.model_copy(update=changes).encoded(), seen)

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self.renew_s):
            try:
                if not self._update(renewed=time.time()):
                    return
            except StoreError:
                continue  # the store may recover before the lease expires; if not, another takes it, and `check` tells

    def _who_holds(self) -> str:
        name = self.prefix.rpartition("/")[2]
        holder = _read(self.storage, self.prefix)[1]
        if holder is None or not holder.token:
            return f"run {name!r} was changing hands at this moment: try again."
        since = datetime.fromtimestamp(holder.since).astimezone().isoformat(sep=" ", timespec="seconds")
        wait_s = math.ceil(min(max(holder.remaining_s(), 0), holder.expires_s))
        return (
            f"run {name!r} is held by process {holder.pid} on {holder.host} since {since}: wait for it to end, "
            f"stop it, or choose another name. If that machine is gone, try again in {wait_s} s."
        )


def _key(prefix: str) -> str:
    return f"{prefix}/LOCK"


def _read(storage: Storage, prefix: str) -> tuple[bytes, _Holder | None]:
    """What LOCK holds, and who that is: None if it is missing or unreadable, and then anybody may take it."""
    try:
        data = storage.read(_key(prefix))
        return data, _Holder.model_validate_json(data)
    except FileNotFoundError:
        return b"", None
    except ValidationError:
        return data, None
