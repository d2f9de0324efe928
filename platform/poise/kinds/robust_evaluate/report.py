"""Tables and figures of evaluations under attack: accuracy by threat, cost of each stage, warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from poise.kinds.robust_evaluate.result import RecheckResult, RobustEvaluateResult, StageSummary
from poise.report.blocks import Cell, Column, RenderedFigure, Row, Section, Table, draw, number, percent, warning_tables
from poise.report.curves import color_of, curve, label, ordered
from poise.report.figures import STYLE, WIDE, css_color, legend, new_figure
from poise.report.record import RunRecord, with_result

__all__ = ["SECTION", "falling"]

_Evaluated = tuple[RunRecord, RobustEvaluateResult]


def _tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    results = with_result(records, RobustEvaluateResult)
    attacked = [(record, result) for record, result in results if result.stages]
    if attacked:
        yield _accuracies(attacked)
        yield _stages(attacked)
    rechecked = [(record, result.rechecked) for record, result in results if result.rechecked]
    if rechecked:
        yield _recheck(rechecked)
    yield from warning_tables(records)


def _plain(result: RobustEvaluateResult) -> dict[str, float]:
    """Accuracies by measure, without the prefix `robust/`."""
    return {name.removeprefix("robust/"): value for name, value in result.accuracies.items()}


def _accuracies(results: Sequence[_Evaluated]) -> Table:
    measures = ordered(measure for _, result in results for measure in _plain(result))
    rows = []
    for record, result in results:
        accuracy = _plain(result)
        note = f"{result.model}, {result.split}, n={result.num_examples:,}"
        cells = [percent(accuracy.get(measure, math.nan), result.num_examples) for measure in measures]
        rows.append(Row(record.name, note, cells))
    return Table(
        title="Accuracy in percent, 95% intervals",
        caption="Accuracy in percent, with 95% Wilson intervals below. An image counts under a threat if it is "
        "classified correctly as it is and withstands every stage of that threat; under \u201cunion\u201d, if it "
        "withstands all stages.",
        heading="run",
        columns=[Column(label(measure), css_color(color_of(measure, measures))) for measure in measures],
        rows=rows,
    )


_STAGE_COLUMNS = (
    Column("threat"),
    Column("attack", in_terminal=False, prose=True),
    Column("attacked"),
    Column("fooled"),
    Column("still correct"),
    Column("union"),
    Column("gradients", in_terminal=False),
    Column("queries", in_terminal=False),
    Column("seconds", in_terminal=False),
)


def _stages(results: Sequence[_Evaluated]) -> Table:
    return Table(
        title="Stages",
        caption="Each stage attacks the images that are still classified correctly under its threat, starting from the "
        "original image. Still correct: percent of all images that are so under the threat afterwards; union: "
        "under all stages up to this one. Gradients and queries: per attacked image; seconds: of all workers together.",
        heading="stage",
        columns=_STAGE_COLUMNS,
        rows=[_stage_row(record, stage) for record, result in results for stage in result.stages],
    )


def _stage_row(record: RunRecord, stage: StageSummary) -> Row:
    attacked = max(stage.attacked, 1)
    seconds = curve(record.rows, "timing", f"stage/{stage.name}").values
    cells = [
        Cell(label(stage.threat or "clean")),
        Cell(stage.attack),
        Cell(f"{stage.attacked:,}"),
        Cell(f"{stage.fooled:,}"),
        percent(stage.still_correct),
        percent(stage.union),
        number(stage.gradients / attacked, form=",.1f"),
        number(stage.queries / attacked, form=",.1f"),
        number(float(seconds[0]) if len(seconds) else None, form=",.1f"),
    ]
    return Row(stage.name, record.name, cells)


def _recheck(rechecked: Sequence[tuple[RunRecord, RecheckResult]]) -> Table:
    """How many stored adversarial examples still fool the model and are feasible, by stage."""
    rows = []
    for record, result in rechecked:
        for stage, counts in result.stages.items():
            cells = [Cell(f"{count:,}") for count in (counts.stored, counts.fools, counts.feasible)]
            rows.append(Row(stage, f"{record.name}, of {result.run}", cells))
    return Table(
        title="Kept adversarial examples, checked again",
        caption="Kept adversarial examples, checked again: how many still fool the model, and how many lie in their "
        "ball and in the box [0, 1].",
        heading="stage",
        columns=[Column("stored"), Column("fool the model"), Column("feasible")],
        rows=rows,
    )


def _details(anchor: str, record: RunRecord) -> Iterator[RenderedFigure | None]:
    stages = record.result.stages if isinstance(record.result, RobustEvaluateResult) else []
    figure = falling(stages)
    caption = (
        "Percent of all images that are still classified correctly after each stage, under each threat and under all "
        "of them."
    )
    yield draw(f"{anchor}-stages", "Accuracy along the stages", figure, caption)


@matplotlib.rc_context(STYLE)
def falling(stages: Sequence[StageSummary]) -> Figure | None:
    """Accuracy under each threat and under their union after each stage; None without an attack."""
    if len(stages) < 2:
        return None
    figure, axes = new_figure(WIDE, 3.4, "", "accuracy (%)")
    threats = ordered(stage.threat for stage in stages[1:])
    places = range(len(stages))
    for threat in threats:
        accuracy = stages[0].still_correct
        values = []
        for stage in stages:
            if stage.threat == threat:
                accuracy = stage.still_correct
            values.append(accuracy)
        color = color_of(threat, threats)
        axes.plot(places, values, drawstyle="steps-mid", marker="o", markersize=4, color=color, label=label(threat))
    union = [stage.union for stage in stages]
    axes.plot(places, union, drawstyle="steps-mid", color=color_of("union"), ls=(0, (3, 2)), label="union")
    axes.set_xticks(places, [stage.name for stage in stages], rotation=20 if len(stages) > 6 else 0)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    legend(axes)
    return figure


SECTION = Section("Robustness under evaluation", RobustEvaluateResult, tables=_tables, details=_details)
