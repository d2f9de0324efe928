from __future__ import annotations

import subprocess
import sys

import pytest

from poise.observe.names import METRICS, PHASES, lookup
from poise.observe.sinks import NullSink


def test_the_set_of_names_is_frozen() -> None:
    """Dashboards and alerts are written against these: a change here is a change to them."""
    assert {(m.name, m.kind, m.labels) for m in METRICS.values()} == {
        ("poise_steps_total", "counter", ("run",)),
        ("poise_examples_total", "counter", ("run",)),
        ("poise_epoch", "gauge", ("run",)),
        ("poise_loss", "gauge", ("run",)),
        ("poise_accuracy", "gauge", ("run",)),
        ("poise_robust_accuracy", "gauge", ("run", "threat")),
        ("poise_objective_weight", "gauge", ("run", "threat")),
        ("poise_learning_rate", "gauge", ("run",)),
        ("poise_gradient_norm", "gauge", ("run",)),
        ("poise_workers", "gauge", ("run",)),
        ("poise_phase_seconds", "histogram", ("run", "phase")),
        ("poise_commits_total", "counter", ("run",)),
        ("poise_commit_seconds", "histogram", ("run",)),
        ("poise_committed_step", "gauge", ("run",)),
        ("poise_evaluation_seconds", "histogram", ("run",)),
        ("poise_restarts_total", "counter", ("run",)),
        ("poise_failures_total", "counter", ("run",)),
        ("poise_samples_total", "counter", ("run",)),
        ("poise_sampled_tokens_total", "counter", ("run",)),
        ("poise_sampler_restarts_total", "counter", ("run",)),
        ("poise_damaged_checkpoints_total", "counter", ("run",)),
    }
    assert PHASES == ("data", "generate", "attack", "forward_backward", "optim", "report")


def test_the_table_keeps_the_rules_of_prometheus() -> None:
    for metric in METRICS.values():
        assert metric.help.endswith(".")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert (metric.buckets is not None) == (metric.kind == "histogram")
        assert list(metric.buckets or ()) == sorted(set(metric.buckets or ()))


@pytest.mark.parametrize(
    ("name", "kind", "labels", "error"),
    [
        ("poise_los", "gauge", ["run"], KeyError),
        ("poise_loss", "counter", ["run"], ValueError),
        ("poise_loss", "gauge", [], ValueError),
        ("poise_loss", "gauge", ["run", "threat"], ValueError),
    ],
)
def test_a_wrong_use_is_refused(name: str, kind: str, labels: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        lookup(name, kind, labels)  # type: ignore[arg-type]


def test_the_null_sink_checks_as_the_others_do() -> None:
    sink = NullSink()
    sink.inc("poise_steps_total", 1, run="a")
    sink.set("poise_epoch", 0.5, run="a")
    sink.observe("poise_phase_seconds", 0.5, run="a", phase="data")
    with pytest.raises(KeyError):
        sink.inc("poise_step_total", run="a")
    with pytest.raises(ValueError, match="phase"):
        sink.observe("poise_phase_seconds", 0.5, run="a")


def test_the_foundation_imports_nothing_heavy() -> None:
    modules = ["environment", "names", "progress", "prometheus", "rows", "sinks", "tensorboard", "timers"]
    lines = [f"import poise.observe.{module}" for module in modules]
    lines.append(
        "import sys; print([m for m in ('torch', 'ray', 'pyarrow', 'boto3', 'poise.store') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
