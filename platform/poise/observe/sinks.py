"""Where metrics go. A sink refuses a name or a label that the table of `poise.observe.names` does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from poise.observe.names import lookup

__all__ = ["NullSink", "Sink", "series_of"]


class Sink(Protocol):
    """Takes metrics by name; labels are keywords, `run` always among them.

    An unknown name raises KeyError; a wrong kind or wrong labels raise ValueError, at the call that made the mistake.
    """

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add `value` >= 0 to a counter."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge to `value`."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count `value` into a histogram."""

    def end(self, run: str) -> None:
        """A run has ended: its series are of use for one more scrape. More values make it a run under way again."""


class NullSink:
    """Keeps nothing, but checks names and labels as the others do."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        lookup(name, "counter", labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        lookup(name, "gauge", labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        lookup(name, "histogram", labels)

    def end(self, run: str) -> None:
        pass


@contextmanager
def series_of(sink: Sink, run: str) -> Iterator[None]:
    """The block is a run: when it ends the sink is told, and before that, whether it failed."""
    try:
        yield
    except Exception:
        sink.inc("poise_failures_total", run=run)
        raise
    finally:
        sink.end(run)
