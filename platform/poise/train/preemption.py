"""Preemption: ending on a signal of a scheduler without losing a step.

Slurm, PBS, Kubernetes and spot machines announce the end of a job with SIGTERM, SIGUSR1 or SIGHUP some time ahead. A
training then finishes its step, commits it and raises `PreemptedError`. Any other code raises it at once, since it
commits its results as they come. All ranks stop at the same step, whichever of them receives the signal.
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
    """The request to this process to end. `reason` is its cause, such as SIGTERM; None as long as there is none."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._deferred = 0
        self._error: PreemptedError | None = None
        self._error_is_due = False
        self._timer: threading.Timer | None = None

    def request(self, reason: str) -> None:
        """Ask this process to end after its step, for causes other than a signal to it."""
        self.reason = self.reason or reason

    @property
    def is_deferred(self) -> bool:
        """Whether a training is running that checks `reason` after each step."""
        return self._deferred > 0

    def error(self, what: str) -> PreemptedError:
        """The error that ends a process that was asked to end. Later signals are ignored."""
        self._error = self._error or PreemptedError(f"{what} after {self.reason}; the same command goes on from there")
        return self._error

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a signal only sets `reason`.

        A second signal, the end of the grace period, or leaving the outermost block after a signal raises.
        """
        self._deferred += 1
        try:
            with self._restore_error():
                yield
        finally:
            self._deferred -= 1
        if self.reason is not None and not self._deferred:
            raise self.error("stopped at the last commit")

    @contextmanager
    def handled(self, otherwise: Callable[[int, FrameType | None], Any] | None = None) -> Iterator[None]:
        """Handle the signals within the block. Does nothing outside the main thread, where Python has no handlers.

        `otherwise`, if given, is called wherever a signal would raise. A signal that the process ignores, as SIGHUP
        under nohup, stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = self.install(otherwise)
        try:
            with self._restore_error():
                yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._timer is not None:  # it would send its signal after this handler is gone
                self._timer.cancel()
            self.reason = None
            self._error = None

    def install(self, otherwise: Callable[[int, FrameType | None], Any] | None = None) -> dict[int, Any]:
        """Handle the signals until the process ends; returns the previous handlers of those that are handled."""
        self.reason = None
        self._error = None
        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
        previous = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

        def handle(number: int, frame: FrameType | None) -> None:
            if self._error is None or self._error_is_due:
                self._handle(number, frame, otherwise)

        for number in previous:
            signal.signal(number, handle)
        return previous

    def end_now(self, error: PreemptedError) -> None:
        """Raise `error` in the main thread; called from another thread when there is nothing left to wait for."""
        if self._error is None:
            self._error = error
            self._error_is_due = True
            os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def _restore_error(self) -> Iterator[None]:
        """Raise the PreemptedError of a handler where Ray has replaced it by a plain KeyboardInterrupt.

        Ray does so with any exception that a handler raises while Ray waits.
        """
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if self._error is None or interrupt is self._error:
                raise
            raise self._error from None

    def _handle(
        self, number: int, frame: FrameType | None, otherwise: Callable[[int, FrameType | None], Any] | None
    ) -> None:
        is_first = self.reason is None
        self._error_is_due = False
        self.reason = self.reason or signal.Signals(number).name
        if self._deferred and is_first:
            # after the grace period the process gets the signal again, which then raises
            self._timer = threading.Timer(env.grace_s(), os.kill, (os.getpid(), number))
            self._timer.daemon = True
            self._timer.start()
        elif otherwise is not None:
            otherwise(number, frame)
        else:
            raise self.error("stopped at the last commit")


PROCESS = StopRequest()
"""The request to this process; there is one, since signals are sent to processes."""


class StopVote:
    """The agreement of all ranks whether to end after a step.

    They vote about once a second, since a vote waits for the device. All ranks vote at the same steps.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._next_step = 0
        self._last_vote = (0, time.monotonic())  # its step and time

    def begin(self, step: int) -> None:
        """Start to measure the time per step; `step` is the next one."""
        self._last_vote = (step, time.monotonic())

    def ask(self, step: int) -> bool:
        """True on every rank if any rank was asked to end. `step` is the number of finished steps, equal on all."""
        reason = self.context.stop.reason
        if self.context.world_size == 1:
            return reason is not None
        if step < self._next_step:
            return False
        import torch  # not at the top: a driver without torch handles signals too

        last_step, last_time = self._last_vote
        now = time.monotonic()
        self._last_vote = (step, now)
        seconds = (now - last_time) / max(1, step - last_step)
        vote = torch.tensor([float(reason is not None), seconds], device=self.context.device)
        stops, mean_seconds = self.context.mean(vote).tolist()
        # every rank computes the next step of a vote from the same mean
        self._next_step = step + min(_MOST_STEPS, max(1, int(_ASK_EVERY_S / max(mean_seconds, 1e-6))))
        if stops > 0:
            self.context.stop.request("a signal to another rank")
        return bool(stops > 0)
