"""One HTML page for one run or several: results, curves, time, spec, environment and what happened on the way.

Invariant: the page is one file without a script or a link to anything outside itself, and every text of a run is
escaped by the template. Equal records give an equal page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

import poise
from poise.report import figures
from poise.report.blocks import Drawn, draw
from poise.report.curves import curve, phase_seconds
from poise.report.record import RunRecord, count_failures, is_alarm, load_record, when
from poise.report.sections import SECTIONS, grouped

__all__ = ["RunRecord", "load_record", "render"]

TONES = {"finished": "good", "failed": "bad", "interrupted": "bad", "damaged": "bad"}
EVENTS_SHOWN = 100


def render(records: Sequence[RunRecord], title: str) -> str:
    """The page of `records` as HTML text; any part of a run may be missing."""
    loader = PackageLoader("poise", "report")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "page.html"
    )
    return template.render(
        title=title,
        version=poise.__version__,
        runs=[_run(index, record) for index, record in enumerate(records)],
        sections=[
            {"title": section.title, "drawings": list(filter(None, section.drawings(group))),
             "grids": [grid for grid in section.grids(group) if any(line.cells for line in grid.lines)]}
            for section, group in grouped(records)
        ],
        phases=draw("phases", "Where the time went", figures.phase_bars([(r.name, r.rows) for r in records]),
                    "Seconds that rank 0 spent in each phase of its training steps, evaluation excluded."),
    )  # fmt: skip


def _run(index: int, record: RunRecord) -> dict[str, Any]:
    alarms = sum(map(is_alarm, record.events))
    return {
        "name": record.name,
        "anchor": f"run-{index + 1}",
        "status": record.status,
        "tone": TONES.get(record.status, ""),
        "ended": record.status in ("finished", "failed"),
        "facts": list(_facts(record)),
        "figures": list(filter(None, _figures(f"run-{index + 1}", record))),
        "spec": record.spec_text,
        "environment": list(_flat(record.environment)),
        "events": _events(record.events),
        "events_total": len(record.events),
        "alarms": alarms,
    }


def _facts(record: RunRecord) -> Iterator[tuple[str, str]]:
    """What a reader asks first: what was run, how far it came, from which seed and commit, how fast."""
    summary, git = record.summary, record.environment.get("git") or {}
    steps = record.rows["step"].to_pylist()
    rate = curve(record.rows, "timing", "examples_per_s").values
    seconds = sum(phase_seconds(record.rows).values())
    events = [event.get("event") for event in record.events]
    yield "kind", record.kind or "unknown"
    if summary.get("objective"):
        yield "objective", str(summary["objective"])
    step = summary.get("step", max(steps, default=0))
    if step:
        yield "step", f"{step:,}"
    for count in ("examples", "questions"):
        if summary.get(count) and not step:
            yield count, f"{summary[count]:,}"
    yield "seed", str(summary.get("seed", "unknown"))
    yield "commit", (git["commit"][:12] + (" + local changes" if git.get("dirty") else "")) if git else "unknown"
    if summary.get("parameters"):
        yield "parameters", f"{summary['parameters']:,}"
    if len(rate):
        unit = SECTIONS[record.kind].unit if record.kind in SECTIONS else "examples"
        yield "speed", f"{np.nanmedian(rate):,.0f} {unit}/s (median)"
    if seconds:
        yield "time in the loop", f"{seconds:,.1f} s"
    if "commit" in events:
        yield "checkpoints committed", f"{events.count('commit'):,}"
    survived, ended = count_failures(record.events)
    if survived:
        yield "failures survived" if record.status == "finished" else "failures", f"{survived:,}"
    if ended:
        yield "commands that ended with an error", f"{ended:,}"
    if record.error:
        yield "error", record.error


def _figures(anchor: str, record: RunRecord) -> Iterator[Drawn | None]:
    """What the kind of the run shows, then what every training has."""
    if record.kind in SECTIONS:
        yield from SECTIONS[record.kind].details(anchor, record)
    rows = record.rows
    yield draw(f"{anchor}-loss", "Loss", figures.loss_curves(rows),
               "Mean over the steps of each log interval and over all workers.")  # fmt: skip
    yield draw(f"{anchor}-lr", "Learning rate", figures.learning_rate(rows), "As the schedule set it.")
    yield draw(f"{anchor}-speed", "Speed", figures.speed(rows),
               "Training examples per second of all workers since the attempt began.")  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (dotted key, text)."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _events(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every failure, and of the other events the last ones, in order."""
    calm = [i for i, event in enumerate(events) if not is_alarm(event)]
    shown = {i for i, event in enumerate(events) if is_alarm(event)} | set(calm[-EVENTS_SHOWN:])
    return [_event(events[i]) for i in sorted(shown)]


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    detail = {key: value for key, value in event.items() if key not in ("event", "time")}
    return {
        "time": when(event.get("time")),
        "name": str(event.get("event", "unknown")),
        "detail": "  ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in detail.items()),
        "alarm": is_alarm(event),
    }
