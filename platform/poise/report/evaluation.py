"""How evaluations under attack are shown: what withstood which threat, what each stage took, and what was doubtful."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from poise.report.blocks import Cell, Column, Drawn, Grid, Line, Section, draw, number, percent, warning_grids
from poise.report.curves import colour, curve, label, ordered
from poise.report.figures import STYLE, VARIABLES, WIDE, canvas, legend
from poise.report.record import RunRecord

__all__ = ["SECTION", "falling"]


def _grids(records: Sequence[RunRecord]) -> Iterator[Grid]:
    attacked = [record for record in records if record.summary.get("stages")]
    if attacked:
        yield _accuracies(attacked)
        yield _stages(attacked)
    if again := [record for record in records if record.summary.get("reverified")]:
        yield _again(again)
    yield from warning_grids(records)


def _accuracies(records: Sequence[RunRecord]) -> Grid:
    measures = ordered(measure for record in records for measure in record.accuracy())
    lines = [
        Line(
            record.name,
            f"{record.summary['model']}, {record.summary['split']}, n={record.examples:,}",
            [percent(record.accuracy().get(measure, math.nan), record.examples) for measure in measures],
        )
        for record in records
    ]
    return Grid(
        title="Accuracy in percent, 95% intervals",
        caption="Accuracy in percent, with 95% Wilson intervals below. An image counts under a threat if it is "
        "classified rightly as it is and withstands every stage of that threat; under \u201cunion\u201d, if it "
        "withstands all stages.",
        heading="run",
        columns=[Column(label(m), f"var(--{VARIABLES[(tone := colour(m, measures))]}, {tone})") for m in measures],
        lines=lines,
    )


_COLUMNS = (
    Column("threat"), Column("attack", brief=False, prose=True), Column("attacked"), Column("fooled"),
    Column("standing"), Column("union"), Column("gradients", brief=False), Column("queries", brief=False),
    Column("seconds", brief=False),
)  # fmt: skip


def _stages(records: Sequence[RunRecord]) -> Grid:
    return Grid(
        title="Stages",
        caption="Each stage attacks the images that still stand under its threat, from the original image. Standing: "
        "percent of all images that stand under the threat afterwards; union: under everything up to here. Gradients "
        "and queries: per attacked image; seconds: of all workers together.",
        heading="stage",
        columns=_COLUMNS,
        lines=[_stage(record, stage) for record in records for stage in record.summary["stages"]],
    )


def _stage(record: RunRecord, stage: Mapping[str, Any]) -> Line:
    each = max(stage["attacked"], 1)
    seconds = curve(record.rows, "timing", f"stage/{stage['name']}").values
    cells = [
        Cell(label(stage["threat"] or "clean")),
        Cell(stage["attack"]),
        Cell(f"{stage['attacked']:,}"),
        Cell(f"{stage['fooled']:,}"),
        percent(stage["standing"]),
        percent(stage["union"]),
        number(stage["gradients"] / each, form=",.1f"),
        number(stage["queries"] / each, form=",.1f"),
        number(float(seconds[0]) if len(seconds) else None, form=",.1f"),
    ]
    return Line(stage["name"], record.name, cells)


def _again(records: Sequence[RunRecord]) -> Grid:
    """What was kept and judged again."""
    lines = [
        Line(stage, f"{record.name}, of {told['run']}", [Cell(f"{n[key]:,}") for key in ("kept", "fools", "feasible")])
        for record in records
        for told in [record.summary["reverified"]]
        for stage, n in told["stages"].items()
    ]
    return Grid(
        title="Kept adversarial examples, judged again",
        caption="Kept adversarial examples, judged again: how many still fool the model, and how many lie in their "
        "ball and in the box [0, 1].",
        heading="stage",
        columns=[Column("kept"), Column("fool the model"), Column("feasible")],
        lines=lines,
    )


def _nothing(records: Sequence[RunRecord]) -> Iterator[Drawn | None]:
    return iter(())


def _details(anchor: str, record: RunRecord) -> Iterator[Drawn | None]:
    figure = falling(record.summary.get("stages") or ())
    caption = "Percent of all images that stand under each threat, and under all of them, after each stage."
    yield draw(f"{anchor}-stages", "Accuracy along the stages", figure, caption)


@matplotlib.rc_context(STYLE)
def falling(stages: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Accuracy under each threat and of the union after each stage of a summary; None without an attack."""
    if len(stages) < 2:
        return None
    figure, axes = canvas(WIDE, 3.4, "", "accuracy (%)")
    threats = ordered(stage["threat"] for stage in stages[1:])
    places = range(len(stages))
    for threat in threats:
        standing, values = stages[0]["standing"], list[float]()
        for stage in stages:
            standing = stage["standing"] if stage["threat"] == threat else standing
            values.append(standing)
        tone = colour(threat, threats)
        axes.plot(places, values, drawstyle="steps-mid", marker="o", markersize=4, color=tone, label=label(threat))
    union = [stage["union"] for stage in stages]
    axes.plot(places, union, drawstyle="steps-mid", color=colour("union"), ls=(0, (3, 2)), label="union")
    axes.set_xticks(places, [stage["name"] for stage in stages], rotation=20 if len(stages) > 6 else 0)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    legend(axes)
    return figure


SECTION = Section("Robustness under evaluation", _grids, _nothing, _details)
