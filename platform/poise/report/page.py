"""One HTML page for one or several runs: results, curves, time, spec, environment and events.

Invariant: the page is one file without scripts and without links to other files, and the template escapes every text of
a run. Equal records give equal pages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

import poise
from poise.report import figures
from poise.report.blocks import RenderedFigure, Section, draw
from poise.report.curves import curve, phase_seconds
from poise.report.record import RunRecord, count_failures, is_alarm, is_failure, when
from poise.report.sections import Sections, grouped

__all__ = ["RunRecord", "render"]

TONES = {"finished": "good", "failed": "bad", "interrupted": "bad", "damaged": "bad"}
EVENTS_SHOWN = 100


def render(records: Sequence[RunRecord], title: str, sections: Sections) -> str:
    """The page of `records` as HTML; parts that a run does not have are left out.

    `sections`: how each kind of run is shown.
    """
    loader = PackageLoader("poise", "report")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    phases = draw(
        "phases",
        "Where the time went",
        figures.phase_bars([(record.name, record.rows) for record in records]),
        "Seconds that rank 0 spent in each phase of its training steps, evaluation excluded.",
    )
    return environment.get_template("page.html").render(
        title=title,
        version=poise.__version__,
        runs=[_run(index, record, sections) for index, record in enumerate(records)],
        sections=[_section(section, group) for section, group in grouped(records, sections)],
        phases=phases,
    )


def _section(section: Section, records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the template shows of the runs of one section."""
    return {
        "title": section.title,
        "figures": list(filter(None, section.rendered_figures(records))),
        "tables": [table for table in section.tables(records) if any(row.cells for row in table.rows)],
    }


def _run(index: int, record: RunRecord, sections: Sections) -> dict[str, Any]:
    """What the template shows of one run."""
    anchor = f"run-{index + 1}"
    return {
        "name": record.name,
        "anchor": anchor,
        "status": record.status,
        "tone": TONES.get(record.status, ""),
        "ended": record.status in ("finished", "failed"),
        "facts": list(_facts(record, sections)),
        "figures": list(filter(None, _figures(anchor, record, sections))),
        "spec": record.spec_text,
        "environment": list(_flat(record.environment)),
        "events": _events(record.events),
        "events_total": len(record.events),
        "failures": sum(map(is_failure, record.events)),
        "alarms": sum(map(is_alarm, record.events)),
    }


def _facts(record: RunRecord, sections: Sections) -> Iterator[tuple[str, str]]:
    """The main facts of a run: kind, result, seed, commit, speed, failures."""
    result_facts = dict(record.result.facts()) if record.result else {}
    steps = record.rows["step"].to_pylist()
    if "step" not in result_facts and any(steps):
        result_facts["step"] = f"{max(steps):,}"
    yield "kind", record.kind or "unknown"
    yield from result_facts.items()
    yield "seed", str(record.result.seed) if record.result else "unknown"
    yield "commit", _commit(record)
    rate = curve(record.rows, "timing", "examples_per_s").values
    if len(rate):
        unit = sections[record.kind].unit if record.kind in sections else "examples"
        # the median, since the first rates contain the start and a pause would move a mean
        yield "speed", f"{np.nanmedian(rate):,.0f} {unit}/s (median)"
    seconds = sum(phase_seconds(record.rows).values())
    if seconds:
        yield "time in the loop", f"{seconds:,.1f} s"
    events = [event.get("event") for event in record.events]
    if "commit" in events:
        yield "checkpoints committed", f"{events.count('commit'):,}"
    survived, ended = count_failures(record.events)
    if survived:
        yield "failures survived" if record.status == "finished" else "failures", f"{survived:,}"
    if ended:
        yield "commands that ended with an error", f"{ended:,}"
    if record.error:
        yield "error", record.error


def _commit(record: RunRecord) -> str:
    """The git commit of the code of a run."""
    git = record.environment.get("git")
    if not git:
        return "unknown"
    changes = " + local changes" if git.get("dirty") else ""
    return f"{git['commit'][:12]}{changes}"


def _figures(anchor: str, record: RunRecord, sections: Sections) -> Iterator[RenderedFigure | None]:
    """The figures of the kind of the run, then those of every training."""
    drawn: Sequence[str] = ()
    if record.kind in sections:
        yield from sections[record.kind].details(anchor, record)
        drawn = sections[record.kind].drawn
    rows = record.rows
    yield draw(
        f"{anchor}-loss",
        "Loss",
        figures.loss_curves(rows),
        "Mean over the steps of each log interval and over all workers.",
    )
    yield draw(
        f"{anchor}-further",
        "Further training metrics",
        figures.further_curves(rows, drawn),
        "Mean over the steps of each log interval and over all workers, each on its own scale.",
    )
    yield draw(f"{anchor}-lr", "Learning rate", figures.learning_rate(rows), "As the schedule set it.")
    yield draw(
        f"{anchor}-speed",
        "Speed",
        figures.speed(rows),
        "Training examples per second of all workers since the attempt began.",
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as pairs of dotted key and text."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _events(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every failure and alarm, and the last EVENTS_SHOWN of the other events, in order."""
    marked = [index for index, event in enumerate(events) if _is_marked(event)]
    others = [index for index, event in enumerate(events) if not _is_marked(event)]
    # the last of the others, since those at the end explain how a run ended
    indices = sorted({*marked, *others[-EVENTS_SHOWN:]})
    return [_event(events[index]) for index in indices]


def _is_marked(event: Mapping[str, Any]) -> bool:
    return is_failure(event) or is_alarm(event)


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    details = []
    for key, value in event.items():
        if key not in ("event", "time"):
            details.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    return {
        "time": when(event.get("time")),
        "name": str(event.get("event", "unknown")),
        "detail": "  ".join(details),
        "marked": _is_marked(event),
    }
