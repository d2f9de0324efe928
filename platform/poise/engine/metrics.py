"""The metric table of `observe.names`, bound to Ray's own metrics: Ray exports them from every node."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from poise.observe.names import lookup

__all__ = ["RaySink"]


class RaySink:
    """A sink whose metrics appear at Ray's Prometheus endpoints, with the prefix `ray_`."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        if value > 0:  # Ray refuses to add 0
            self._metric(name, "counter", labels).inc(value, tags=labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._metric(name, "gauge", labels).set(value, tags=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metric(name, "histogram", labels).observe(value, tags=labels)

    def end(self, run: str) -> None:
        """Ray takes away what a process has exported when that process is gone."""

    def _metric(self, name: str, kind: Any, labels: dict[str, str]) -> Any:
        metric = lookup(name, kind, labels)
        if name not in self._made:
            keys = tuple(metric.labels)
            if kind == "histogram":
                self._made[name] = Histogram(name, metric.help, boundaries=list(metric.buckets or ()), tag_keys=keys)
            else:
                self._made[name] = (Counter if kind == "counter" else Gauge)(name, metric.help, tag_keys=keys)
        return self._made[name]
