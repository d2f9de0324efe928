"""The table of metrics on prometheus_client, and the HTTP endpoint that Prometheus scrapes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.registry import Collector

from poise.errors import UserError
from poise.observe.names import METRICS, Metric, lookup

__all__ = ["PrometheusSink"]

KEPT_S = 60.0
"""Seconds for which the series of a run that has ended are served: the default interval between two scrapes of
Prometheus."""

_INTERVAL_S = 15.0
"""The interval between two scrapes that is assumed until the second scrape."""

_SENT_WITHIN_S = 0.5
"""The time for the response to a scrape to be sent."""


class PrometheusSink:
    """A `Sink` with every metric of the table in `registry` (by default a new one), which it can serve over HTTP.

    The series of a run that has ended are removed KEPT_S later, at the next scrape or the next end of a run: a sweep of
    a thousand trials serves only those that are running. `clock` returns seconds.
    """

    def __init__(self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry or CollectorRegistry()
        self._clock = clock
        self._lock = threading.Lock()
        self._ended: dict[str, float] = {}
        self._scrapes = _ScrapeHook(self._on_scrape)
        self.registry.register(self._scrapes)  # before the metrics, so that expired series are not collected
        self._last_scrape: float | None = None
        self._interval = _INTERVAL_S
        self._collectors = {name: _collector(metric, self.registry) for name, metric in METRICS.items()}
        self._shutdown: list[Callable[[], None]] = []

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        lookup(name, "counter", labels)
        self._ended.pop(labels["run"], None)
        self._collectors[name].labels(**labels).inc(value)  # type: ignore[union-attr]

    def set(self, name: str, value: float, **labels: str) -> None:
        lookup(name, "gauge", labels)
        self._ended.pop(labels["run"], None)
        self._collectors[name].labels(**labels).set(value)  # type: ignore[union-attr]

    def observe(self, name: str, value: float, **labels: str) -> None:
        lookup(name, "histogram", labels)
        self._ended.pop(labels["run"], None)
        self._collectors[name].labels(**labels).observe(value)  # type: ignore[union-attr]

    def end(self, run: str) -> None:
        with self._lock:
            self._expire()
            self._ended[run] = self._clock()

    def wait_for_scrape(self) -> None:
        """Wait until Prometheus has read the last values: for 1.5 intervals between scrapes, and KEPT_S at most.

        Returns at once if there was no scrape so far.
        """
        before = self._last_scrape
        deadline = self._clock() + min(1.5 * self._interval, KEPT_S)
        while before is not None and self._last_scrape == before and self._clock() < deadline:
            time.sleep(0.1)
        if self._last_scrape != before:
            time.sleep(_SENT_WITHIN_S)

    def serve(self, port: int, *, address: str = "0.0.0.0") -> int:
        """Serve `/metrics` from a daemon thread until `close()`. Returns the port; with 0 the system chooses one.

        The default address is every interface, since Prometheus scrapes from another host. UserError if the port is
        taken, out of range or not allowed.
        """
        try:
            server, thread = start_http_server(port, address, self.registry)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot serve metrics on {address} port {port}: {error}; choose a free port, or 0 for any"
            ) from error

        def shutdown() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._shutdown.append(shutdown)
        return int(server.server_port)

    def _on_scrape(self) -> None:
        """Record the time of a scrape, and remove expired series."""
        with self._lock:
            now = self._clock()
            if self._last_scrape is not None:
                self._interval = now - self._last_scrape
            self._last_scrape = now
            self._expire()

    def _expire(self) -> None:
        """Remove the series of every run that ended KEPT_S ago or earlier."""
        expired = [run for run, ended in list(self._ended.items()) if self._clock() - ended >= KEPT_S]
        for run in expired:
            self._ended.pop(run, None)
            for collector in self._collectors.values():
                collector.remove_by_labels({"run": run})

    def close(self) -> None:
        """Stop the servers that `serve` started."""
        while self._shutdown:
            self._shutdown.pop()()


class _ScrapeHook(Collector):
    """A collector without metrics that calls a function whenever the registry is read."""

    def __init__(self, on_scrape: Callable[[], None]) -> None:
        self._on_scrape = on_scrape

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterable[Any]:
        self._on_scrape()
        return ()


def _collector(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    """The metric of prometheus_client for a metric of the table."""
    if metric.buckets is not None:
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
    metric_type = Counter if metric.kind == "counter" else Gauge
    return metric_type(metric.name, metric.help, metric.labels, registry=registry)
