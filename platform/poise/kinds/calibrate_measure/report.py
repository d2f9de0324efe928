"""Tables and figures of calibration: errors with intervals, the hardest questions, reliability diagrams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from poise.kinds.calibrate_measure.result import CalibrateMeasureResult, ListedQuestion
from poise.report.blocks import Cell, Column, RenderedFigure, Row, Section, Table, draw, number, percent, warning_tables
from poise.report.curves import COLORS
from poise.report.figures import HALF, MUTED, STYLE, WIDE, legend, new_figure
from poise.report.record import RunRecord, with_result
from poise.stats import wilson

__all__ = ["SECTION", "confidences", "reliability_diagram"]

ESTIMATES = {"sem1": ("Sem1", COLORS["linf"]), "sem2": ("Sem2", COLORS["union"])}
FEW = 30
"""A bin of fewer questions is drawn faintly: its accuracy is uncertain."""

_HEADLINE_ERRORS = {"sem1": "Sem1-ECE", "sem2": "Sem2-ECE", "true": "true ECE"}
_ESTIMATE_MEASURES = {
    "confidence": "confidence",
    "bias": "bias",
    "ece_all": "ECE, all",
    "smooth_ece": "smECE",
    "debiased_ece": "debiased L2",
    "brier": "Brier",
    "auroc": "AUROC",
}


def _tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    results = with_result(records, CalibrateMeasureResult)
    if not results:
        return
    yield Table(
        title="Calibration; below each ECE its unbiased estimate, with 95% interval",
        caption="Expected calibration errors (ECE, L1) of the answered questions. The plug-in ECE is biased upwards by "
        "the noise of the grades; below it stands the median-unbiased estimate with its 95% interval, by test "
        "inversion (Carpenter 1999, Hansen 1999), which covers whether a model is calibrated or not. Sem1: the share "
        "of the largest class of answers. Sem2: the class that one half of the answers chooses is scored on the other "
        "half, over all halvings. True ECE: the confidence is the model\u2019s exact probability of its answer, where "
        "the world is known. Coverage: the share of the n questions with an answer. Accuracy: of all questions, where "
        "no answer is a wrong one, with its 95% Wilson interval.",
        heading="run",
        columns=[
            Column("accuracy"),
            *map(Column, _HEADLINE_ERRORS.values()),
            Column("Sem1 \u2212 Sem2", in_terminal=False),
        ],
        rows=[Row(record.name, _note(result), _headline_cells(result)) for record, result in results],
    )
    yield from warning_tables([record for record, _ in results])
    yield Table(
        title="",
        caption="Each estimate of confidence by itself, over the answered questions. Bias: mean confidence minus "
        "accuracy. ECE, all: with the questions without an answer, as wrong with confidence 0. Noise floor: the ECE "
        "that a calibrated model with these confidences would show on so many questions. ECE, all, smECE and debiased "
        "L2 are point estimates without an interval; other intervals are percentiles of a bootstrap over questions.",
        heading="run",
        columns=[Column(text) for text in [*_ESTIMATE_MEASURES.values(), "noise floor"]],
        rows=list(_estimate_rows(results)),
    )
    protocols = [Row(record.name, "", [Cell(result.protocol)], selected=False) for record, result in results]
    yield Table("", "What the numbers depend on.", "run", [Column("protocol", prose=True)], protocols)
    for record, result in results:
        yield from _questions(record.name, result)


def _note(result: CalibrateMeasureResult) -> str:
    coverage = percent(result.coverage).text
    return f"n={result.num_examples:,}, coverage {coverage}%, seed {result.seed}"


def _headline_cells(result: CalibrateMeasureResult) -> list[Cell]:
    errors = [_error(result, name) for name in _HEADLINE_ERRORS]
    return [_metric(result, "accuracy"), *errors, _metric(result, "difference/ece")]


def _error(result: CalibrateMeasureResult, name: str) -> Cell:
    """The plug-in ECE; below it, on two lines, the unbiased estimate and its interval."""
    plug_in = _metric(result, f"{name}/ece")
    unbiased = _metric(result, f"{name}/unbiased_ece")
    return Cell(plug_in.text, f"{unbiased.text}\n{unbiased.below}" if unbiased.below else "")


def _estimate_rows(results: Sequence[tuple[RunRecord, CalibrateMeasureResult]]) -> Iterator[Row]:
    """A row for each run and estimate of confidence."""
    for record, result in results:
        for name, (text, _) in ESTIMATES.items():
            cells = [_metric(result, f"{name}/{measure}") for measure in _ESTIMATE_MEASURES]
            cells.append(number(result.noise_floor[name]))
            yield Row(record.name, text, cells, selected=False)


def _metric(result: CalibrateMeasureResult, name: str) -> Cell:
    """A metric with its interval, if it has one."""
    value, low, high = result.metrics.get(name, (None, None, None))
    return number(value, None if low is None or high is None else (low, high))


def _questions(run: str, result: CalibrateMeasureResult) -> Iterator[Table]:
    columns = [Column("answers", prose=True), *map(Column, ("Sem1", "Sem2", "gap", "correct"))]
    hardest = "largest gap between Sem1 and Sem2: the choice of the answer is uncertain"
    confidently_wrong = "wrong although at least nine answers in ten agree: the gap does not show the error"
    for questions, caption in ((result.hardest, hardest), (result.confidently_wrong, confidently_wrong)):
        rows = []
        for question in questions:
            rows.append(Row(question.question, f"{question.K} classes", _question_cells(question), selected=False))
        if rows:
            yield Table("", f"{run}: {caption}.", "question", columns, rows)


def _question_cells(question: ListedQuestion) -> list[Cell]:
    answers = ", ".join(f"{label} \u00d7{count}" for label, count in question.answers)
    numbers = [number(value) for value in (question.sem1, question.sem2, question.gap)]
    return [Cell(answers), *numbers, Cell("yes" if question.correct else "no")]


def _details(anchor: str, record: RunRecord) -> Iterator[RenderedFigure | None]:
    result = record.result if isinstance(record.result, CalibrateMeasureResult) else None
    bins = result.reliability if result else {}
    histogram = result.histogram if result else {}
    caption = (
        f"Accuracy against mean confidence in each bin, with 95% Wilson intervals and the number of questions; bins of "
        f"fewer than {FEW} are faint. Below the diagonal: over-confident."
    )
    for name, (text, color) in ESTIMATES.items():
        figure = reliability_diagram(bins.get(name), color)
        yield draw(f"{anchor}-reliability-{name}", f"Reliability of {text}", figure, caption)
    yield draw(f"{anchor}-confidences", "Confidences", confidences(histogram), "Questions by confidence.")


@matplotlib.rc_context(STYLE)
def reliability_diagram(bins: Mapping[str, Sequence[float]] | None, color: str) -> Figure | None:
    """Accuracy with its interval against mean confidence, and the count of each bin; None without bins."""
    if not bins or not bins["count"]:
        return None
    figure, axes = new_figure(HALF, 3.6, "mean confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    for count, confidence, accuracy in zip(bins["count"], bins["confidence"], bins["accuracy"], strict=True):
        low, high = wilson(accuracy, int(count))
        interval = [[max(accuracy - low, 0)], [max(high - accuracy, 0)]]
        alpha = 0.4 if count < FEW else 1.0
        axes.errorbar(confidence, accuracy, interval, color=color, alpha=alpha, marker="o", ms=5, lw=1.2, capsize=2.5)
        axes.annotate(f"{count:.0f}", (confidence, accuracy), xytext=(6, -3), textcoords="offset points", color=MUTED)
    axes.set_xlim(-0.02, 1.06)
    axes.set_ylim(-0.02, 1.02)
    return figure


@matplotlib.rc_context(STYLE)
def confidences(histogram: Mapping[str, Sequence[int]]) -> Figure | None:
    """Histograms of the confidence of the questions, by each estimate; None without any."""
    if not histogram:
        return None
    figure, axes = new_figure(WIDE, 2.6, "confidence", "questions")
    for name, (text, color) in ESTIMATES.items():
        counts = [*histogram[name], histogram[name][-1]]  # steps-post needs the right edge of the last cell
        axes.plot(np.linspace(0, 1, len(counts)), counts, drawstyle="steps-post", color=color, label=text)
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


SECTION = Section("Calibration", CalibrateMeasureResult, tables=_tables, details=_details, unit="requests")
