"""Sinks for metrics. A sink raises for a name or a label that is not in the table of `poise.observe.names`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from poise.observe.names import lookup

__all__ = ["NullSink", "Sink", "series_of"]


class Sink(Protocol):
    """Takes values of metrics by name. Labels are keywords; `run` is always one of them.

    Raises KeyError for an unknown name, ValueError for a wrong kind or wrong labels.
    """

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add `value` >= 0 to a counter."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge to `value`."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count `value` into a histogram."""

    def end(self, run: str) -> None:
        """Mark a run as ended: its series are kept for one more scrape. Later values mark it as running again."""


class NullSink:
    """Discards all values, but checks names and labels as the other sinks do."""

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
    """Count a failure if the block, which is a run, raises, and mark the run as ended."""
    try:
        yield
    except Exception:
        sink.inc("poise_failures_total", run=run)
        raise
    finally:
        sink.end(run)
