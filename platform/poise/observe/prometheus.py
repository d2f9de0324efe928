"""The table of metrics on prometheus_client, and the HTTP endpoint that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from poise.errors import UserError
from poise.observe.names import METRICS, Metric, lookup

__all__ = ["PrometheusSink"]


class PrometheusSink:
    """A `Sink` that keeps every metric of the table in `registry` (its own one by default) and can serve it."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._collectors = {name: _collector(metric, self.registry) for name, metric in METRICS.items()}
        self._shutdown: list[Callable[[], None]] = []

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        lookup(name, "counter", labels)
        self._collectors[name].labels(**labels).inc(value)  # type: ignore[union-attr]

    def set(self, name: str, value: float, **labels: str) -> None:
        lookup(name, "gauge", labels)
        self._collectors[name].labels(**labels).set(value)  # type: ignore[union-attr]

    def observe(self, name: str, value: float, **labels: str) -> None:
        lookup(name, "histogram", labels)
        self._collectors[name].labels(**labels).observe(value)  # type: ignore[union-attr]

    def serve(self, port: int, *, address: str = "0.0.0.0") -> int:
        """Serve `/metrics` from a daemon thread until `close()`; returns the port, which 0 leaves to the system.

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

    def close(self) -> None:
        """Stop what `serve` started."""
        while self._shutdown:
            self._shutdown.pop()()


def _collector(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if metric.buckets is not None:
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)
