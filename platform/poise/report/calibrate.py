"""How measurements of calibration are shown: errors with intervals, the hardest questions, reliability diagrams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from poise.report.blocks import Cell, Column, Drawn, Grid, Line, Section, draw, number, percent, warning_grids
from poise.report.curves import COLOURS
from poise.report.figures import HALF, MUTED, STYLE, WIDE, canvas, legend
from poise.report.record import RunRecord
from poise.stats import wilson

__all__ = ["SECTION", "confidences", "reliability_diagram"]

ESTIMATES = {"sem1": ("Sem1", COLOURS["linf"]), "sem2": ("Sem2", COLOURS["union"])}
FEW = 30
"""A bin of fewer questions is drawn faintly: its accuracy says little."""

_HEADLINE = {"sem1": "Sem1-ECE", "sem2": "Sem2-ECE", "true": "true ECE"}
_EACH = {
    "confidence": "confidence",
    "bias": "bias",
    "ece_all": "ECE, all",
    "smooth_ece": "smECE",
    "debiased_ece": "debiased L2",
    "brier": "Brier",
    "auroc": "AUROC",
}


def _grids(records: Sequence[RunRecord]) -> Iterator[Grid]:
    found = [record for record in records if record.summary.get("metrics")]
    if not found:
        return
    yield Grid(
        title="Calibration; below each ECE its unbiased estimate, with 95% interval",
        caption="Expected calibration errors (ECE, L1) of the answered questions. The plug-in ECE is biased upwards by "
        "the noise of the grades; below it stands the median-unbiased estimate with its 95% interval, by test "
        "inversion (Carpenter 1999, Hansen 1999), which covers whether a model is calibrated or not. Sem1: the share "
        "of the largest class of answers. Sem2: the class that one half of the answers chooses is scored on the other "
        "half, over all halvings. True ECE: the confidence is the model\u2019s exact probability of its answer, where "
        "the world is known. Coverage: the share of the n questions with an answer. Accuracy: of all questions, where "
        "no answer is a wrong one, with its 95% Wilson interval.",
        heading="run",
        columns=[*map(Column, ("accuracy", *_HEADLINE.values())), Column("Sem1 \u2212 Sem2", brief=False)],
        lines=[Line(r.name, _note(r), _headline(r)) for r in found],
    )
    yield from warning_grids(found)
    yield Grid(
        title="",
        caption="Each estimate of confidence by itself, over the answered questions. Bias: mean confidence minus "
        "accuracy. ECE, all: with the questions without an answer, as wrong with confidence 0. Noise floor: the ECE "
        "that a calibrated model with these confidences would show on so many questions. ECE, all, smECE and debiased "
        "L2 are point estimates without an interval; other intervals are percentiles of a bootstrap over questions.",
        heading="run",
        columns=[Column(text) for text in [*_EACH.values(), "noise floor"]],
        lines=[
            Line(r.name, text, _each(r, name), selected=False) for r in found for name, (text, _) in ESTIMATES.items()
        ],
    )
    protocols = [Line(r.name, "", [Cell(str(r.summary.get("protocol")))], False) for r in found]
    yield Grid("", "What the numbers depend on.", "run", [Column("protocol", prose=True)], protocols)
    for record in found:
        yield from _questions(record)


def _note(record: RunRecord) -> str:
    coverage = percent(record.summary["coverage"]).text
    return f"n={record.examples:,}, coverage {coverage}%, seed {record.summary.get('seed')}"


def _headline(record: RunRecord) -> list[Cell]:
    errors = [_error(record, name) for name in _HEADLINE]
    return [_estimate(record, "accuracy"), *errors, _estimate(record, "difference/ece")]


def _error(record: RunRecord, name: str) -> Cell:
    """The plug-in ECE; below it, on lines of their own, the estimate without bias and its interval."""
    plug_in, unbiased = _estimate(record, f"{name}/ece"), _estimate(record, f"{name}/unbiased_ece")
    return Cell(plug_in.text, f"{unbiased.text}\n{unbiased.below}" if unbiased.below else "")


def _each(record: RunRecord, name: str) -> list[Cell]:
    return [*(_estimate(record, f"{name}/{key}") for key in _EACH), number(record.summary["noise_floor"][name])]


def _estimate(record: RunRecord, name: str) -> Cell:
    value, *interval = record.summary["metrics"].get(name) or [None]
    return number(value, None if None in interval else interval)


def _questions(record: RunRecord) -> Iterator[Grid]:
    columns = [Column("answers", prose=True), *map(Column, ("Sem1", "Sem2", "gap", "correct"))]
    for key, caption in {
        "hardest": "largest gap between Sem1 and Sem2: the model does not know which answer it means",
        "confidently_wrong": "wrong although at least nine answers in ten agree: no gap betrays them",
    }.items():
        if listed := record.summary.get(key):
            lines = [
                Line(question["question"], f"{question['K']} classes", _question(question), False)
                for question in listed
            ]
            yield Grid("", f"{record.name}: {caption}.", "question", columns, lines)


def _question(question: Mapping[str, Any]) -> list[Cell]:
    answers = ", ".join(f"{label} \u00d7{count}" for label, count in question["answers"])
    numbers = [number(question[key]) for key in ("sem1", "sem2", "gap")]
    return [Cell(answers), *numbers, Cell("yes" if question["correct"] else "no")]


def _details(anchor: str, record: RunRecord) -> Iterator[Drawn | None]:
    bins, histogram = record.summary.get("reliability") or {}, record.summary.get("histogram") or {}
    for name, (text, tone) in ESTIMATES.items():
        yield draw(f"{anchor}-reliability-{name}", f"Reliability of {text}", reliability_diagram(bins.get(name), tone),
                   f"Accuracy against mean confidence in each bin, with 95% Wilson intervals and the number of "
                   f"questions; bins of fewer than {FEW} are faint. Below the diagonal: over-confident.")  # fmt: skip
    yield draw(f"{anchor}-confidences", "Confidences", confidences(histogram), "Questions by confidence.")


@matplotlib.rc_context(STYLE)
def reliability_diagram(bins: Mapping[str, Sequence[float]] | None, tone: str) -> Figure | None:
    """Accuracy with its interval against mean confidence, and the count of each bin; None without bins."""
    if not bins or not bins["count"]:
        return None
    figure, axes = canvas(HALF, 3.6, "mean confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    for count, confidence, accuracy in zip(bins["count"], bins["confidence"], bins["accuracy"], strict=True):
        low, high = wilson(accuracy, int(count))
        reach = [[max(accuracy - low, 0)], [max(high - accuracy, 0)]]
        faint = 0.4 if count < FEW else 1.0
        axes.errorbar(confidence, accuracy, reach, color=tone, alpha=faint, marker="o", ms=5, lw=1.2, capsize=2.5)
        axes.annotate(f"{count:.0f}", (confidence, accuracy), xytext=(6, -3), textcoords="offset points", color=MUTED)
    axes.set_xlim(-0.02, 1.06)
    axes.set_ylim(-0.02, 1.02)
    return figure


@matplotlib.rc_context(STYLE)
def confidences(histogram: Mapping[str, Sequence[int]]) -> Figure | None:
    """How many questions have how much confidence, by each estimate; None without any."""
    if not histogram:
        return None
    figure, axes = canvas(WIDE, 2.6, "confidence", "questions")
    for name, (text, tone) in ESTIMATES.items():
        counts = [*histogram[name], histogram[name][-1]]
        axes.plot(np.linspace(0, 1, len(counts)), counts, drawstyle="steps-post", color=tone, label=text)
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


SECTION = Section("Calibration", _grids, lambda records: (), _details, unit="requests")
