"""Alerts and dashboard ask for metrics that exist, with labels that they carry."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import promql_parser as promql
import pytest
import yaml

from poise.observe.names import METRICS, Metric

ROOT = Path(__file__).parents[2]
FILES = ROOT / "helm" / "poise" / "files"
RULES = [rule for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
PANELS = json.loads((FILES / "dashboard.json").read_text())["panels"]
EXPRESSIONS = {
    **{rule["alert"]: rule["expr"] for rule in RULES},
    **{
        f"{panel['title']} {target['refId']}": target["expr"].replace("$run", "demo")
        for panel in PANELS
        for target in panel["targets"]
    },
}


def metric_of(exported: str) -> Metric:
    """The metric behind an exported name: Ray adds a prefix, a histogram has three series."""
    name = re.sub(r"^ray_", "", exported)
    if name not in METRICS:
        name = re.sub(r"_(bucket|sum|count)$", "", name)
        assert METRICS[name].kind == "histogram", exported
    return METRICS[name]


def selectors(text: str) -> Iterator[promql.VectorSelector]:
    found: list[promql.VectorSelector] = []

    def keep(node: promql.Expr) -> bool:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql.walk(promql.parse(text), keep)
    names = {selector.name for selector in found}
    assert names == set(re.findall(r"\b(?:ray_)?poise_\w+", text)), "the walk missed a selector"
    yield from found


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_every_metric_exists_and_carries_the_labels_that_are_asked_of_it(place):
    for selector in selectors(EXPRESSIONS[place]):
        metric = metric_of(selector.name)
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= set(metric.labels), selector.name
        assert metric.kind != "histogram" or re.search(r"_(bucket|sum|count)$", selector.name)


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_the_threads_of_a_run_are_put_together_by_labels_that_the_metric_has(place):
    grouped = {label for labels in re.findall(r"by \(([^)]*)\)", EXPRESSIONS[place]) for label in labels.split(", ")}
    known = {label for selector in selectors(EXPRESSIONS[place]) for label in metric_of(selector.name).labels}
    assert grouped <= known | {"le"}


def test_a_metric_that_does_not_exist_is_caught():
    with pytest.raises(KeyError):
        metric_of("ray_poise_lost")
    with pytest.raises(AssertionError):
        metric_of("ray_poise_loss_bucket")


def test_the_name_with_and_without_the_prefix_is_the_one_that_is_exported():
    """The driver, which no Ray exports, counts the worker group's restarts and its own failures; all else is the
    workers'."""
    names = {selector.name for text in EXPRESSIONS.values() for selector in selectors(text)}
    assert {name for name in names if not name.startswith("ray_")} == {"poise_restarts_total", "poise_failures_total"}
    assert not {"ray_poise_restarts_total", "ray_poise_failures_total"} & names


def test_alerts_say_which_run_and_how_bad():
    for rule in RULES:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert "$labels.run" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


def test_panels_do_not_overlap_and_ask_the_chosen_source():
    places = [tuple(panel["gridPos"].values()) for panel in PANELS]
    assert len({place[:2] for place in places}) == len(PANELS) == 10
    assert all(x + width <= 24 for x, _, width, _ in places)
    assert all(panel["datasource"]["uid"] == "${source}" for panel in PANELS)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize(
    "arguments",
    [
        ("test", "rules", "tests/helm/alerts.test.yaml"),
        ("check", "config", "cluster/prometheus/prometheus.yaml"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_promtool_agrees(arguments):
    done = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
