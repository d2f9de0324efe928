"""Every metric that Poise exports, in one table: name, kind, help, labels, buckets.

Invariant: metrics are declared only here. Prometheus in the driver and ray.util.metrics in the workers are both built
from METRICS, so a dashboard or an alert works for every process. Each metric has the label `run`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["METRICS", "PHASES", "Kind", "Metric", "lookup"]

Kind = Literal["counter", "gauge", "histogram"]

PHASES = ("data", "generate", "attack", "forward_backward", "optim", "report")
"""The phases of a step. `generate` occurs in self-play only, `attack` in adversarial training only."""

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True)
class Metric:
    """One exported metric; `buckets` (upper bounds, in the unit of the name) are those of a histogram."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ("run",)
    buckets: tuple[float, ...] | None = None


_TABLE = (
    Metric("poise_steps_total", "counter", "Optimizer steps taken, repeated ones after a restart included."),
    Metric("poise_examples_total", "counter", "Training examples consumed by all ranks."),
    Metric("poise_epoch", "gauge", "Epochs completed, with the fraction of the current one."),
    Metric("poise_loss", "gauge", "Training objective, mean since the last report."),
    Metric("poise_accuracy", "gauge", "Clean validation accuracy, 0 to 1."),
    Metric("poise_robust_accuracy", "gauge", "Validation accuracy under attack, 0 to 1.", ("run", "threat")),
    Metric("poise_objective_weight", "gauge", "Weight of a threat in the training objective.", ("run", "threat")),
    Metric("poise_learning_rate", "gauge", "Learning rate of the first parameter group."),
    Metric("poise_gradient_norm", "gauge", "Global l2 norm of the gradient before clipping."),
    Metric("poise_workers", "gauge", "Training workers that hold the run now."),
    Metric("poise_phase_seconds", "histogram", "Seconds per step in one phase.", ("run", "phase"), _SHORT),
    Metric("poise_commits_total", "counter", "Checkpoints committed."),
    Metric("poise_commit_seconds", "histogram", "Seconds from a checkpoint's capture to its commit.", buckets=_LONG),
    Metric("poise_committed_step", "gauge", "Step of the newest committed checkpoint."),
    Metric("poise_evaluation_seconds", "histogram", "Seconds of one evaluation, attacks included.", buckets=_LONG),
    Metric("poise_restarts_total", "counter", "Restarts of the workers after a failure."),
    Metric("poise_failures_total", "counter", "Ends of the run with an error, none that a restart could mend."),
    Metric("poise_samples_total", "counter", "Responses sampled from language models."),
    Metric("poise_sampled_tokens_total", "counter", "Tokens sampled from language models, prompts not counted."),
    Metric("poise_sampler_restarts_total", "counter", "Engines of the sampler that died and were replaced."),
    Metric("poise_damaged_checkpoints_total", "counter", "Checkpoints that were found damaged and skipped."),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}


def lookup(name: str, kind: Kind, labels: Iterable[str]) -> Metric:
    """The metric `name` of the table.

    Raises KeyError for an unknown name, ValueError if its kind is not `kind` or its labels are not `labels`.
    """
    if name not in METRICS:
        raise KeyError(f"no metric is called {name!r}; metrics are declared in poise.observe.names")
    metric = METRICS[name]
    if metric.kind != kind:
        raise ValueError(f"{name} is a {metric.kind}, not a {kind}")
    if set(labels) != set(metric.labels):
        raise ValueError(f"{name} takes the labels {sorted(metric.labels)}, got {sorted(labels)}")
    return metric
