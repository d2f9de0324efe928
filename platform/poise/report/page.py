"""One HTML page for one run or several: results, curves, time, spec, environment and what happened on the way.

Invariant: the page is one file without a script or a link to anything outside itself, and every text of a run is
escaped by the template. Equal records give an equal page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

import poise
from poise.report import figures
from poise.report.curves import colour, curve, label, ordered, phase_seconds, wilson
from poise.report.record import RunRecord, is_alarm, load_record, when

__all__ = ["RunRecord", "load_record", "render"]

TONES = {"finished": "good", "failed": "bad", "interrupted": "bad", "damaged": "bad"}
EVENTS_SHOWN = 100


@dataclass(frozen=True)
class Drawn:
    """A figure on its way into the page."""

    title: str
    svg: Markup
    caption: str


def render(records: Sequence[RunRecord], title: str) -> str:
    """The page of `records` as HTML text; any part of a run may be missing."""
    loader = PackageLoader("poise", "report")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "page.html"
    )
    finals = [(record.name, record.accuracy(), record.examples) for record in records]
    return template.render(
        title=title,
        version=poise.__version__,
        runs=[_run(index, record) for index, record in enumerate(records)],
        results=_results(records),
        attacks=_attacks(records),
        bars=_draw("final", "Clean and robust test accuracy", figures.final_bars(finals),
                   "Selected checkpoint of each run on the test images, with 95% Wilson intervals."),
        phases=_draw("phases", "Where the time went", figures.phase_bars([(r.name, r.rows) for r in records]),
                     "Seconds that rank 0 spent in each phase of its training steps, evaluation excluded."),
    )  # fmt: skip


def _draw(name: str, title: str, figure: Figure | None, caption: str) -> Drawn | None:
    if figure is None:
        return None
    return Drawn(title, Markup(figures.to_svg(figure, name, f"{title}. {caption}")), caption)


def _run(index: int, record: RunRecord) -> dict[str, Any]:
    alarms = sum(map(is_alarm, record.events))
    return {
        "name": record.name,
        "anchor": f"run-{index + 1}",
        "status": record.status,
        "tone": TONES.get(record.status, ""),
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
    rate = curve(record.rows, "timing", "images_per_s").values
    seconds = sum(phase_seconds(record.rows).values())
    events = [event.get("event") for event in record.events]
    yield "kind", record.kind or "unknown"
    if summary.get("objective"):
        yield "objective", str(summary["objective"])
    yield "step", f"{summary.get('step', max(steps, default=0)):,}"
    yield "seed", str(summary.get("seed", "unknown"))
    yield "commit", (git["commit"][:12] + (" + local changes" if git.get("dirty") else "")) if git else "unknown"
    if summary.get("parameters"):
        yield "parameters", f"{summary['parameters']:,}"
    if len(rate):
        yield "speed", f"{np.nanmedian(rate):,.0f} images/s (median)"
    if seconds:
        yield "time in the loop", f"{seconds:,.1f} s"
    if "commit" in events:
        yield "checkpoints committed", f"{events.count('commit'):,}"
    if alarms := sum(map(is_alarm, record.events)):
        yield "failures survived" if record.status == "finished" else "failures", f"{alarms:,}"
    if record.error:
        yield "error", record.error


def _figures(anchor: str, record: RunRecord) -> Iterator[Drawn | None]:
    rows, best = record.rows, record.summary.get("best_step")
    yield _draw(f"{anchor}-accuracy", "Accuracy", figures.accuracy_curves(rows, best),
                "Solid: held-out validation images under the threats of training. Dotted: training batches under the "
                "training attack. A widening gap is robust overfitting.")  # fmt: skip
    yield _draw(f"{anchor}-loss", "Loss", figures.loss_curves(rows),
                "Mean over the steps of each log interval and over all workers.")  # fmt: skip
    yield _draw(f"{anchor}-weights", "Adaptive weights", figures.weight_curves(rows),
                "Weight of each threat in the training objective.")  # fmt: skip
    yield _draw(f"{anchor}-lr", "Learning rate", figures.learning_rate(rows), "As the schedule set it.")
    yield _draw(
        f"{anchor}-speed",
        "Speed",
        figures.speed(rows),
        "Training images per second of all workers since the attempt began.",
    )


def _results(records: Sequence[RunRecord]) -> dict[str, Any]:
    measures = ordered(m for r in records for c in r.checkpoints for m in r.accuracy(c))
    selected = [record.accuracy() for record in records]
    top = {m: max((a[m] for a in selected if math.isfinite(a.get(m, math.nan))), default=math.nan) for m in measures}
    return {
        "measures": [{"label": label(m), "colour": _css(colour(m, measures))} for m in measures],
        "rows": [_result(r, c, measures, top) for r in records for c in r.checkpoints],
    }


def _css(tone: str) -> str:
    name = figures.VARIABLES[tone]
    return f"var(--{name}, {tone})"


def _result(record: RunRecord, checkpoint: str, measures: Sequence[str], top: Mapping[str, float]) -> dict[str, Any]:
    accuracy, selected = record.accuracy(checkpoint), checkpoint == record.checkpoints[0]
    cells = [_cell(accuracy.get(m, math.nan), record.examples) for m in measures]
    for cell, measure in zip(cells, measures, strict=True):
        cell["top"] = selected and accuracy.get(measure) == top[measure]
    step = record.summary.get("best_step" if checkpoint == "best" else "step")
    return {
        "run": record.name,
        "checkpoint": checkpoint + (f", step {step:,}" if step is not None else ""),
        "selected": selected,
        "cells": cells,
        "examples": f"{record.examples:,}" if record.examples else "unknown",
        "seed": record.summary.get("seed", "unknown"),
    }


def _cell(value: float, examples: int) -> dict[str, Any]:
    if not math.isfinite(value):
        return {"text": "\u2013", "interval": ""}
    interval = ""
    if examples > 0:
        low, high = wilson(value, examples)
        interval = f"{100 * low:.1f}\u2013{100 * high:.1f}"
    return {"text": f"{100 * value:.1f}", "interval": interval}


def _attacks(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """One line per threat and wording: runs that were attacked alike share it, others stand apart."""
    runs: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for threat, text in (record.summary.get("attacks") or {}).items():
            runs.setdefault((threat, str(text)), []).append(record.name)
    order = ordered(threat for threat, _ in runs)
    return [
        {"label": label(threat), "text": text, "runs": "all" if len(names) == len(records) else ", ".join(names)}
        for (threat, text), names in sorted(runs.items(), key=lambda item: order.index(item[0][0]))
    ]


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
