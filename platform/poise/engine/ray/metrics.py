"""A metrics sink on Ray's metrics, which Ray exports from every node. The table of metrics is `observe.names`."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from poise.observe.names import lookup

__all__ = ["RaySink"]


class RaySink:
    """A `Sink` whose metrics appear at Ray's Prometheus endpoints, with the prefix `ray_`."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        if value > 0:  # Ray refuses to add 0
            self._metric(name, "counter", labels).inc(value, tags=labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._metric(name, "gauge", labels).set(value, tags=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metric(name, "histogram", labels).observe(value, tags=labels)

    def end(self, run: str) -> None:
        """Does nothing: Ray removes the series of a process when the process has ended."""

    def _metric(self, name: str, kind: Any, labels: dict[str, str]) -> Any:
        """Ray's metric of that name, made at its first use; raises as `lookup` does."""
        metric = lookup(name, kind, labels)
        if name not in self._metrics:
            keys = tuple(metric.labels)
            if kind == "histogram":
                boundaries = list(metric.buckets or ())
                self._metrics[name] = Histogram(name, metric.help, boundaries=boundaries, tag_keys=keys)
            else:
                metric_type = Counter if kind == "counter" else Gauge
                self._metrics[name] = metric_type(name, metric.help, tag_keys=keys)
        return self._metrics[name]
