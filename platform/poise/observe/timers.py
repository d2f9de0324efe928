"""Timers of the phases of a step: one context manager per phase, at the same points of every loop.

Invariant: at most one phase runs at a time. A phase opened inside another pauses it, so the sum of all seconds never
exceeds the wall-clock time.

On a GPU the host only submits work, so its clock does not say how long a phase takes. `DevicePhaseTimers` puts a marker
into the work of the device at each border of a phase instead, and reads the times of the markers when they are asked
for: no phase waits for the device.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from poise.observe.names import PHASES

__all__ = ["DevicePhaseTimers", "Marker", "PhaseTimers"]

_LONGEST_WAIT = 4096
"""The number of markers after which the older half of them is read, also if nobody has asked for the times."""


class Marker(Protocol):
    """A marker in the work of a device, as `torch.cuda.Event(enable_timing=True)` that was recorded."""

    def synchronize(self) -> None:
        """Wait until the device has reached the marker."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds of the device between this marker and a later one; both were reached."""


class PhaseTimers:
    """`with timers("attack"): ...` adds wall-clock seconds to a phase; about 1 us per use, not thread-safe.

    `clock` returns seconds.
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


class DevicePhaseTimers(PhaseTimers):
    """As `PhaseTimers`, with the seconds of a device between the borders of a phase.

    `marker` puts a new marker into the work of the device and returns at once. The device is waited for only by
    `totals` and `take`. Where the host is the slower of the two, the device idles until the marker is submitted, so
    that its time is also that of the host.
    """

    def __init__(self, marker: Callable[[], Marker], phases: Sequence[str] = PHASES) -> None:
        super().__init__(phases)
        self._marker = marker
        # Borders that are not read yet: the marker, and the innermost phase that is open after it.
        self._borders: list[tuple[Marker, str | None]] = []

    @property
    def totals(self) -> dict[str, float]:
        self._charge()
        self._read(len(self._borders))
        return dict(self._seconds)

    def _charge(self) -> None:
        """Mark the end of the phase that is open until now; `_Span` calls this before it opens or closes a phase."""
        marker = self._marker()
        if self._borders:
            last_marker, _ = self._borders[-1]
            self._borders[-1] = (last_marker, self._open[-1] if self._open else None)
        self._borders.append((marker, None))
        if len(self._borders) > _LONGEST_WAIT:
            self._read(_LONGEST_WAIT // 2)

    def _read(self, count: int) -> None:
        """Add the seconds between the first `count` borders to their phases. The last of them stays, as a start."""
        borders = self._borders[:count]
        borders[-1][0].synchronize()  # the device reaches markers in their order
        for (start, phase), (end, _) in itertools.pairwise(borders):
            if phase is not None:
                self._seconds[phase] += start.elapsed_time(end) / 1000
        self._borders = self._borders[count - 1 :]


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
