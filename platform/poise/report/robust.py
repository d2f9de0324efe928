"""How runs of robust training are shown: accuracy under each threat, and the curves of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from poise.report import figures, figures_robust
from poise.report.blocks import Cell, Column, Drawn, Grid, Line, Section, draw, number, percent
from poise.report.curves import colour, label, ordered
from poise.report.record import RunRecord

__all__ = ["SECTION"]


def _grids(records: Sequence[RunRecord]) -> Iterator[Grid]:
    measures = ordered(m for r in records for c in r.checkpoints for m in r.accuracy(c))
    selected = [record.accuracy() for record in records]
    top = {m: max((a[m] for a in selected if math.isfinite(a.get(m, math.nan))), default=math.nan) for m in measures}
    yield Grid(
        title="Test accuracy in percent, 95% intervals",
        caption="Test accuracy in percent, with 95% Wilson intervals below; robust columns are under attack, "
        "\u201cunion\u201d counts an image only if it withstands every attack. Bold: highest of the "
        "selected checkpoints.",
        heading="run",
        columns=[Column(label(m), _css(colour(m, measures))) for m in measures],
        lines=[_line(r, c, measures, top) for r in records for c in r.checkpoints or [""]],
    )
    yield from _overfitting(records, measures)
    yield from _attacks(records)


def _overfitting(records: Sequence[RunRecord], measures: Sequence[str]) -> Iterator[Grid]:
    """How much better the best checkpoint is than the final one; a run that was stopped says why."""
    differences = {record.name: record.summary.get("best_minus_final") or {} for record in records}
    if not any(differences.values()):
        return
    lines = []
    for record in records:
        found = {name.removeprefix("robust/"): value for name, value in differences[record.name].items()}
        points = {m: None if found.get(m) is None else 100 * found[m] for m in measures}
        stopped = record.summary.get("stopped") or {}
        note = f"stopped at step {stopped['step']:,}: {stopped['why']}" if stopped else ""
        lines.append(Line(record.name, note, [number(value, form="+.1f") for value in points.values()], True))
    yield Grid(
        title="Best minus final checkpoint, points",
        caption="Test accuracy of the best checkpoint minus that of the final one, in points. The best is chosen on "
        "held-out training images. A large difference is robust overfitting.",
        heading="run",
        columns=[Column(label(m)) for m in measures],
        lines=lines,
    )


def _css(tone: str) -> str:
    return f"var(--{figures.VARIABLES[tone]}, {tone})"


def _line(record: RunRecord, checkpoint: str, measures: Sequence[str], top: Mapping[str, float]) -> Line:
    accuracy, selected = record.accuracy(checkpoint), checkpoint == next(iter(record.checkpoints), "")
    values = {m: accuracy.get(m, math.nan) for m in measures}
    cells = [percent(value, record.examples, top=selected and value == top[m]) for m, value in values.items()]
    return Line(record.name, _note(record, checkpoint), cells, selected)


def _note(record: RunRecord, checkpoint: str) -> str:
    if not checkpoint:
        return "not evaluated"
    step = record.summary.get("best_step" if checkpoint == "best" else "step")
    parts = [checkpoint, f"step {step:,}" if step is not None else "", f"n={record.examples:,}" * bool(record.examples)]
    return ", ".join([*filter(None, parts), f"seed {record.summary.get('seed', 'unknown')}"])


def _attacks(records: Sequence[RunRecord]) -> Iterator[Grid]:
    """One line per threat and wording: runs that were attacked alike share it, others stand apart."""
    runs: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for threat, text in (record.summary.get("attacks") or {}).items():
            runs.setdefault((threat, str(text)), []).append(record.name)
    order = ordered(threat for threat, _ in runs)
    found = sorted(runs.items(), key=lambda item: order.index(item[0][0]))
    lines = [
        Line(label(threat), "all runs" if len(names) == len(records) else ", ".join(names), [Cell(text)], False)
        for (threat, text), names in found
    ]
    if lines:
        yield Grid("", "The attacks behind the robust columns.", "threat", [Column("attack", prose=True)], lines)


def _drawings(records: Sequence[RunRecord]) -> Iterator[Drawn | None]:
    finals = [(record.name, record.accuracy(), record.examples) for record in records]
    yield draw("final", "Clean and robust test accuracy", figures.final_bars(finals),
               "Selected checkpoint of each run on the test images, with 95% Wilson intervals.")  # fmt: skip


def _details(anchor: str, record: RunRecord) -> Iterator[Drawn | None]:
    rows, best = record.rows, record.summary.get("best_step")
    yield draw(f"{anchor}-accuracy", "Accuracy", figures.accuracy_curves(rows, best),
               "Solid: held-out validation images under the threats of training. Dotted: training batches under the "
               "training attack. A widening gap is robust overfitting.")  # fmt: skip
    yield draw(f"{anchor}-weights", "Adaptive weights", figures.weight_curves(rows),
               "Weight of each threat in the training objective.")  # fmt: skip
    yield draw(f"{anchor}-gap", "Robust gap", figures_robust.gap_curves(rows),
               "Accuracy on training images minus that on held-out ones, under equal attacks.")  # fmt: skip
    yield draw(f"{anchor}-overfitting", "Catastrophic overfitting", figures_robust.overfitting_curves(rows),
               "A fixed batch of training images: accuracy under one step and under many, and the cosine between input "
               "gradients at the image and at a random point of the ball. Dashed: alarm.")  # fmt: skip
    yield draw(f"{anchor}-steps", "Sum of step sizes", figures_robust.step_sizes(rows),
               "Bounds on the robust gap by stability grow with it.")  # fmt: skip


SECTION = Section("Robustness", _grids, _drawings, _details)
