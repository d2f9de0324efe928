from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from poise.errors import UserError
from poise.observe.names import METRICS, PHASES
from poise.observe.prometheus import KEPT_S, PrometheusSink
from poise.observe.sinks import series_of


@pytest.fixture
def sink() -> Iterator[PrometheusSink]:
    sink = PrometheusSink()
    yield sink
    sink.close()


def _scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_what_goes_in_is_scraped_over_http(sink: PrometheusSink) -> None:
    sink.inc("poise_steps_total", 3, run="a")
    sink.inc("poise_steps_total", run="a")
    sink.set("poise_robust_accuracy", 0.25, run="a", threat="linf")
    for seconds in (0.004, 0.2, 99.0):
        sink.observe("poise_phase_seconds", seconds, run="a", phase="attack")
    samples = _scrape(sink.serve(0, address="127.0.0.1"))
    assert samples["poise_steps_total", (("run", "a"),)] == 4
    assert samples["poise_robust_accuracy", (("run", "a"), ("threat", "linf"))] == 0.25
    phase = (("phase", "attack"), ("run", "a"))
    assert samples["poise_phase_seconds_count", phase] == 3
    assert samples["poise_phase_seconds_sum", phase] == pytest.approx(99.204)
    assert samples["poise_phase_seconds_bucket", (("le", "0.005"), *phase)] == 1
    assert samples["poise_phase_seconds_bucket", (("le", "10.0"), *phase)] == 2


def test_a_port_in_use_is_a_users_mistake(sink: PrometheusSink) -> None:
    port = sink.serve(0, address="127.0.0.1")
    with pytest.raises(UserError, match=f"port {port}.*choose a free port"):
        PrometheusSink().serve(port, address="127.0.0.1")
    with pytest.raises(UserError, match="port 70000"):
        sink.serve(70000, address="127.0.0.1")


def test_a_closed_sink_frees_its_port() -> None:
    sink = PrometheusSink()
    port = sink.serve(0, address="127.0.0.1")
    sink.close()
    other = PrometheusSink()
    assert other.serve(port, address="127.0.0.1") == port
    other.close()


def test_two_sinks_live_in_one_process_and_a_registry_can_be_shared() -> None:
    registry = CollectorRegistry()
    one, two = PrometheusSink(registry), PrometheusSink()
    one.set("poise_epoch", 1.5, run="a")
    two.set("poise_epoch", 2.5, run="a")
    assert registry.get_sample_value("poise_epoch", {"run": "a"}) == 1.5
    assert two.registry.get_sample_value("poise_epoch", {"run": "a"}) == 2.5


def test_mistakes_are_raised_at_the_call(sink: PrometheusSink) -> None:
    with pytest.raises(KeyError):
        sink.set("poise_unknown", 1, run="a")
    with pytest.raises(ValueError, match="threat"):
        sink.set("poise_robust_accuracy", 1, run="a")
    with pytest.raises(ValueError, match="not a counter"):
        sink.inc("poise_epoch", 1, run="a")
    with pytest.raises(ValueError):
        sink.inc("poise_steps_total", -1, run="a")


def fill(sink: PrometheusSink, run: str) -> None:
    """One value of every metric of the table, for five phases and three threats."""
    for metric in METRICS.values():
        write = {"counter": sink.inc, "gauge": sink.set, "histogram": sink.observe}[metric.kind]
        values = {"phase": PHASES, "threat": ("linf", "l2", "l1")}
        for value in values.get(metric.labels[-1], (None,)):
            write(metric.name, 1.0, run=run, **({metric.labels[-1]: value} if value else {}))


def runs_of(sink: PrometheusSink) -> set[str]:
    return {s.labels["run"] for family in sink.registry.collect() for s in family.samples}


def test_a_thousand_runs_leave_the_series_of_the_last_minute() -> None:
    now = [0.0]
    sink = PrometheusSink(clock=lambda: now[0])
    for number in range(1000):
        fill(sink, f"trial-{number:04}")
        now[0] += 20.0
        sink.end(f"trial-{number:04}")
    assert runs_of(sink) == {f"trial-{number:04}" for number in (997, 998, 999)}
    one = sum(len(family.samples) for family in sink.registry.collect()) / 3
    assert 140 < one < 170
    now[0] += KEPT_S
    assert runs_of(sink) == set()


def test_the_last_values_are_served_once_more_and_a_run_that_goes_on_keeps_its_series() -> None:
    now = [0.0]
    sink = PrometheusSink(clock=lambda: now[0])
    sink.set("poise_loss", 0.5, run="a")
    sink.set("poise_loss", 0.7, run="b")
    sink.end("a")
    sink.end("b")
    now[0] += KEPT_S - 1
    assert runs_of(sink) == {"a", "b"}
    sink.set("poise_loss", 0.4, run="b")  # started again under its name
    now[0] += 2
    assert runs_of(sink) == {"b"}


def test_how_a_run_ended_is_waited_for_only_where_somebody_reads() -> None:
    sink = PrometheusSink()
    port = sink.serve(0, address="127.0.0.1")
    started = time.monotonic()
    sink.wait_for_scrape()
    assert time.monotonic() - started < 0.1
    assert ("poise_failures_total", (("run", "a"),)) not in _scrape(port)
    with pytest.raises(UserError), series_of(sink, "a"):
        raise UserError("no such file")
    read: list[float] = []
    reader = threading.Timer(0.3, lambda: read.append(_scrape(port)["poise_failures_total", (("run", "a"),)]))
    reader.start()
    sink.wait_for_scrape()
    reader.join()
    assert read == [1.0]
    sink.close()


def test_a_run_that_ends_well_or_is_interrupted_has_not_failed() -> None:
    sink = PrometheusSink()
    with series_of(sink, "a"):
        sink.set("poise_loss", 0.5, run="a")
    with pytest.raises(KeyboardInterrupt), series_of(sink, "a"):
        raise KeyboardInterrupt
    assert {s.name for family in sink.registry.collect() for s in family.samples} == {"poise_loss"}
