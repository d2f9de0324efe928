"""Exports the values of metric rows to the gauges in the table of metrics."""

from __future__ import annotations

from collections.abc import Mapping

from poise.observe.sinks import Sink

__all__ = ["export"]

_GAUGES = {
    "loss": "poise_loss",
    "clean": "poise_accuracy",
    "lr": "poise_learning_rate",
    "grad_norm": "poise_gradient_norm",
}
_PER_THREAT = {"robust": "poise_robust_accuracy", "weight": "poise_objective_weight"}


def export(sink: Sink, run: str, metrics: Mapping[str, float]) -> None:
    """Set the gauge of every metric that has one. Accuracies must be those of held-out data."""
    for name, value in metrics.items():
        group, _, threat = name.partition("/")
        if name in _GAUGES:
            sink.set(_GAUGES[name], value, run=run)
        elif threat and group in _PER_THREAT:
            sink.set(_PER_THREAT[group], value, run=run, threat=threat)
