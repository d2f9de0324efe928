"""Ending early without losing a step: what a scheduler's signals ask for.

Slurm, PBS, Kubernetes and spot machines announce an end with SIGTERM, SIGUSR1 or SIGHUP some time ahead. A training
finishes its step, commits it and raises `PreemptedError`; whatever else is going on raises it at once, since it has
committed what it had. On several ranks all stop at the same step, whichever of them was told.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from poise import env
from poise.errors import PreemptedError

if TYPE_CHECKING:
    from poise.train.context import Context

__all__ = ["PROCESS", "StopRequest", "StopVote"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_ASK_EVERY_S = 1.0
_MOST_STEPS = 1000


class StopRequest:
    """Whether this process was asked to end. `reason` says by what, such as SIGTERM; None while it was not."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._deferred = 0
        self._error: PreemptedError | None = None
        self._error_is_due = False
        self._timer: threading.Timer | None = None

    def request(self, reason: str) -> None:
        """Ask this process to end when its step is done: for what is told otherwise than by a signal."""
        self.reason = self.reason or reason

    @property
    def is_deferred(self) -> bool:
        """Whether somebody looks at `reason` and ends in good order."""
        return self._deferred > 0

    def error(self, what: str) -> PreemptedError:
        """The error that ends a process that was asked to; from here on, signals no longer disturb its end."""
        self._error = self._error or PreemptedError(f"{what} after {self.reason}; the same command goes on from there")
        return self._error

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block lasts a signal only sets `reason`; a second one, or one not looked at, raises."""
        self._deferred += 1
        try:
            with self._named():
                yield
        finally:
            self._deferred -= 1
        if self.reason is not None and not self._deferred:
            raise self.error("stopped at the last commit")

    @contextmanager
    def handled(self, otherwise: Callable[[int, FrameType | None], Any] | None = None) -> Iterator[None]:
        """Take the signals for as long as the block lasts; in the main thread, where alone Python allows it.

        `otherwise` is called, instead of raising, for a signal that nobody looks at. A signal that is ignored, as
        SIGHUP is under nohup, stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = self.install(otherwise)
        try:
            with self._named():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._timer is not None:
                self._timer.cancel()
            self.reason, self._error = None, None

    def install(self, otherwise: Callable[[int, FrameType | None], Any] | None = None) -> dict[int, Any]:
        """Take the signals for good; the handlers that were there before."""
        self.reason, self._error = None, None
        before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
        taken = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

        def handle(number: int, frame: FrameType | None) -> None:
            if self._error is None or self._error_is_due:
                self._take(number, frame, otherwise)

        for number in taken:
            signal.signal(number, handle)
        return taken

    def end_now(self, error: PreemptedError) -> None:
        """Raise `error` in the main thread, called from another one: there is nothing to wait for any more."""
        if self._error is None:
            self._error, self._error_is_due = error, True
            os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Ray turns whatever a handler raises while it waits into a plain KeyboardInterrupt: say what it was."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if self._error is None or interrupt is self._error:
                raise
            raise self._error from None

    def _take(
        self, number: int, frame: FrameType | None, otherwise: Callable[[int, FrameType | None], Any] | None
    ) -> None:
        first, self._error_is_due = self.reason is None, False
        self.reason = self.reason or signal.Signals(number).name
        if self._deferred and first:
            self._timer = threading.Timer(env.grace_s(), os.kill, (os.getpid(), number))
            self._timer.daemon = True
            self._timer.start()
        elif otherwise is not None:
            otherwise(number, frame)
        else:
            raise self.error("stopped at the last commit")


PROCESS = StopRequest()
"""That of this process: signals are sent to processes."""


class StopVote:
    """Whether all ranks end after this step.

    They agree on it about once a second, and at the same steps, since an answer waits for the device.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._next_step = 0
        self._asked = (0, time.monotonic())

    def begin(self, step: int) -> None:
        """The next step to be done is `step`."""
        self._asked = (step, time.monotonic())

    def ask(self, step: int) -> bool:
        """True on every rank if any of them was asked to end. `step` are the steps done, the same on all."""
        reason = self.context.stop.reason
        if self.context.world_size == 1:
            return reason is not None
        if step < self._next_step:
            return False
        import torch  # here: a driver without torch takes signals too

        before, then = self._asked
        self._asked = (step, time.monotonic())
        seconds = (self._asked[1] - then) / max(1, step - before)
        answer = torch.tensor([float(reason is not None), seconds], device=self.context.device)
        stops, mean_seconds = self.context.mean(answer).tolist()
        self._next_step = step + min(_MOST_STEPS, max(1, int(_ASK_EVERY_S / max(mean_seconds, 1e-6))))
        if stops > 0:
            self.context.stop.request("a signal to another rank")
        return bool(stops > 0)
