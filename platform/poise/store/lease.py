"""A lease on a run's name, so that only one driver has the run at a time.

The object `LOCK` records the holder. It is only created and compared-and-swapped, never written or deleted, so that the
store decides every race. The clocks of hosts that share a store should agree to within `expires_s`; if they do not, a
holder may lose its lease, which it notices, but two drivers never hold it.
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
from poise.spec import SpecModel
from poise.store.process import ProcessId
from poise.store.storage import Storage

__all__ = ["Lease"]


class _Holder(SpecModel):
    """The content of LOCK. After a release the token is empty."""

    token: str
    host: str
    pid: int
    started: int | None
    space: str
    """With `pid` and `started` the identity of the process: see `ProcessId`."""
    since: float
    renewed: float
    expires_s: float

    def encoded(self) -> bytes:
        return self.model_dump_json(indent=1).encode()

    def is_alive(self) -> bool:
        """Whether the lease is held: not released, renewed in time, and its process is not known to have ended."""
        if not self.token or self.remaining_s() < 0 or self.is_implausible():
            return False
        return not ProcessId(self.pid, self.started, self.space).is_gone()

    def remaining_s(self) -> float:
        """Seconds until the lease expires unless it is renewed."""
        return self.renewed + self.expires_s - time.time()

    def is_implausible(self) -> bool:
        """Whether the time of renewal is in the future: the clock of the holder or of this machine is wrong."""
        return self.renewed > time.time() + self.expires_s


class Lease:
    """The right to be the only driver of the run below `prefix`; a context manager.

    A thread renews it every `renew_s` seconds. Another driver may take it over `expires_s` seconds after the last
    renewal, or at once if its process ran on this machine and has ended.
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
        """Acquire the lease, or raise `RunBusyError` that names the holder."""
        self.storage.check_exclusion()
        now = time.time()
        holder = _Holder(
            token=self.token,
            host=socket.gethostname(),
            **asdict(ProcessId.current()),
            since=now,
            renewed=now,
            expires_s=self.expires_s,
        )
        if not self._acquire(holder):
            raise RunBusyError(self._busy_message())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(self.expires_s)
        with suppress(StoreError):  # a lease that cannot be released expires
            self._update(token="")

    def check(self) -> None:
        """Raise `RunBusyError` unless the store still names this lease as the holder."""
        if not self.holds(self.storage, self.prefix, self.token):
            raise RunBusyError(f"{self._busy_message()} This driver had it before, and stops here.")

    @staticmethod
    def holds(storage: Storage, prefix: str, token: str) -> bool:
        """Whether the lease on `prefix` is held with this token. A worker checks it before it commits."""
        holder = _read(storage, prefix)[1]
        return holder is not None and holder.token == token != ""

    @staticmethod
    def is_held(storage: Storage, prefix: str) -> bool:
        """Whether any driver holds the lease on `prefix`."""
        holder = _read(storage, prefix)[1]
        return holder is not None and holder.is_alive()

    def _acquire(self, new: _Holder) -> bool:
        """Write `new` into LOCK unless another driver holds the lease; returns whether it was written."""
        if self.storage.create(_key(self.prefix), new.encoded()):
            return True
        data, holder = _read(self.storage, self.prefix)
        if holder is not None and (holder.is_alive() or self._is_renewed(holder, data)):
            return False
        return self.storage.compare_and_swap(_key(self.prefix), new.encoded(), data)

    def _is_renewed(self, holder: _Holder, data: bytes) -> bool:
        """Whether a holder with an implausible clock renews its lease; waits for as long as a lease lasts.

        `data` is the content of LOCK with that holder.
        """
        has_ended = ProcessId(holder.pid, holder.started, holder.space).is_gone()
        if not holder.token or not holder.is_implausible() or has_ended:
            return False
        deadline = time.monotonic() + holder.expires_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.renew_s))
            if _read(self.storage, self.prefix)[0] != data:
                return True
        return False

    def _update(self, **changes: str | float) -> bool:
        """Change fields of this lease in LOCK; False if the lease was lost."""
        data, holder = _read(self.storage, self.prefix)
        if holder is None or holder.token != self.token:
            return False
        changed = holder.model_copy(update=changes)
        return self.storage.compare_and_swap(_key(self.prefix), changed.encoded(), data)

    def _renew_until_stopped(self) -> None:
        """Runs in the thread: renew the lease until it is released or lost."""
        while not self._stop.wait(self.renew_s):
            try:
                if not self._update(renewed=time.time()):
                    return
            except StoreError:
                continue  # the store may recover before the lease expires; if it does not, `check` raises

    def _busy_message(self) -> str:
        """The message that names the holder and what to do."""
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
    """The content of LOCK and its holder; None if LOCK is missing or unreadable, and then any driver may take it."""
    try:
        data = storage.read(_key(prefix))
        return data, _Holder.model_validate_json(data)
    except FileNotFoundError:
        return b"", None
    except ValidationError:
        return data, None
