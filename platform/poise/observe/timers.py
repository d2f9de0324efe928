"""Timers of the phases of a step: one context manager per phase, at the same points of every loop.

Invariant: at most one phase runs at a time. A phase opened inside another pauses it, so the sum of all seconds never
exceeds the wall-clock time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from poise.observe.names import PHASES

__all__ = ["PhaseTimers"]


class PhaseTimers:
    """`with timers("attack"): ...` adds wall-clock seconds to a phase; about 1 us per use, not thread-safe.

    `clock` returns seconds. On a GPU the host's clock measures launches, not kernels: pass a clock that synchronizes
    first to measure the device's time.
    """

    def __init__(self, phases: Sequence[str] = PHASES, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(phases, 0.0)
        self._last_take = dict(self._seconds)
        self._spans = {phase: _Span(self, phase) for phase in phases}
        self._open: list[str] = []
        self._mark = 0.0

    def __call__(self, phase: str) -> _Span:
        """The context manager of `phase`; KeyError if there is no such phase."""
        return self._spans[phase]

    @property
    def totals(self) -> dict[str, float]:
        """Seconds of every phase since the start, including the elapsed part of an open phase."""
        self._charge()
        return dict(self._seconds)

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last `take`, including the elapsed part of an open phase."""
        before = self._last_take
        self._last_take = self.totals
        return {phase: seconds - before[phase] for phase, seconds in self._last_take.items()}

    def _charge(self) -> None:
        """Add the seconds since the last call to the innermost open phase."""
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._mark
        self._mark = now


class _Span:
    """The context manager of one phase. It has no state, so that one object serves all uses, nested ones too."""

    __slots__ = ("_phase", "_timers")

    def __init__(self, timers: PhaseTimers, phase: str) -> None:
        self._timers = timers
        self._phase = phase

    def __enter__(self) -> None:
        self._timers._charge()
        self._timers._open.append(self._phase)

    def __exit__(self, *exception: object) -> None:
        self._timers._charge()
        self._timers._open.pop()
