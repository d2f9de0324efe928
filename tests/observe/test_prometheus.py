from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from poise.errors import UserError
from poise.observe.prometheus import PrometheusSink


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
