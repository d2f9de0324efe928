"""Tables and figures of calibration from the result of a measured run."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from poise.kinds import report_sections
from poise.kinds.calibrate_measure.report import (
    ESTIMATES,
    SECTION,
    confidences,
    reliability_diagram,
)
from poise.kinds.calibrate_measure.result import AnswerCounts, CalibrateMeasureResult, ListedQuestion
from poise.report.page import render
from poise.report.record import RunRecord
from poise.report.table import comparison

BINS = {"low": [0.2, 0.9], "high": [0.3, 1.0], "count": [12, 88], "confidence": [0.25, 0.97], "accuracy": [0.5, 0.75]}
HARD = ListedQuestion(
    question="the poet of <b> ?", answers=[("ann", 3), ("bob", 2)], K=2, sem1=0.6, sem2=0.4, gap=0.2, correct=False
)


@pytest.fixture
def record() -> RunRecord:
    each = ("confidence", "bias", "ece", "debiased_ece", "smooth_ece", "brier")
    metrics = {f"{name}/{key}": (0.25, 0.125, 0.5) for name in ESTIMATES for key in each}
    metrics |= {f"{name}/ece": (0.3, None, None) for name in ESTIMATES}
    metrics |= {f"{name}/unbiased_ece": (0.25, 0.125, 0.5) for name in ESTIMATES}
    metrics |= {"accuracy": (0.72, 0.6, 0.8), "difference/ece": (-0.01, None, None), "sem1/auroc": (None, None, None)}
    result = CalibrateMeasureResult(
        run="asked",
        seed=3,
        num_examples=100,
        tokens=2_000,
        protocol="n=5",
        coverage=0.98,
        answers=AnswerCounts(drawn=500, empty=0, no_answer=10, truncated=0, tied_questions=1),
        metrics=metrics,
        noise_floor={"sem1": 0.04, "sem2": 0.05},
        reliability={"sem1": BINS, "sem2": BINS},
        histogram={"sem1": [0, 40, 60], "sem2": [10, 30, 60]},
        hardest=[HARD],
        confidently_wrong=[],
    )
    return RunRecord("asked", kind="calibrate.measure", result=result, status="finished")


def cells(table, row: int = 0) -> dict[str, tuple[str, str]]:
    shown = zip(table.columns, table.rows[row].cells, strict=True)
    return {column.label: (cell.text, cell.below) for column, cell in shown}


def test_the_headline_has_the_errors_with_their_intervals(record):
    headline, each, protocol, hardest = SECTION.tables([record])
    found = cells(headline)
    assert headline.rows[0].note == "n=100, coverage 98.0%, seed 3"
    assert found["accuracy"] == ("0.720", "0.600\u20130.800")
    assert found["Sem1-ECE"] == ("0.300", "0.250\n0.125\u20130.500")
    assert found["Sem1 \u2212 Sem2"] == ("-0.010", "")
    assert found["true ECE"] == ("\u2013", "")  # not known outside a world
    assert [line.note for line in each.rows] == ["Sem1", "Sem2"]
    assert cells(each)["AUROC"] == ("\u2013", "")
    assert cells(each, 1)["noise floor"] == ("0.050", "")
    assert cells(protocol)["protocol"] == ("n=5", "")
    assert hardest.rows[0].cells[0].text == "ann \u00d73, bob \u00d72"
    assert cells(hardest)["correct"] == ("no", "")


def test_the_method_is_named_on_the_page_and_in_the_terminal(record):
    headline, *_ = SECTION.tables([record])
    assert "test inversion" in headline.caption
    assert "its unbiased estimate, with 95% interval" in headline.title
    known = {"true/ece": (0.2, None, None), "true/unbiased_ece": (0.175, 0.1, 0.3)}
    in_world = record.result.model_copy(update={"metrics": record.result.metrics | known})
    text = Console(width=80, file=io.StringIO())
    for table in comparison([replace(record, result=in_world)], report_sections()):
        text.print(table)
    printed = text.file.getvalue()
    for shown in ("true ECE", "0.250", "0.125\u20130.500", "0.175", "0.100\u20130.300"):
        assert shown in printed


def test_a_run_that_has_measured_nothing_has_no_table(record):
    assert list(SECTION.tables([RunRecord("young", kind="calibrate.measure")])) == []
    assert len(list(SECTION.tables([RunRecord("young", kind="calibrate.measure"), record]))) == 4


def test_the_diagram_shows_each_bin_with_its_count_and_interval(record):
    figure = reliability_diagram(BINS, "#0072b2")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["12", "88"]
    points = [bar.lines[0].get_xydata()[0].tolist() for bar in axes.containers]
    assert points == [[0.25, 0.5], [0.97, 0.75]]
    faint, full = (bar.lines[0].get_alpha() for bar in axes.containers)
    assert faint < full == 1
    assert reliability_diagram(None, "#0072b2") is None


def test_the_histogram_has_a_line_for_each_estimate(record):
    (axes,) = confidences(record.result.histogram).axes
    assert [line.get_label() for line in axes.get_lines()] == ["Sem1", "Sem2"]
    assert axes.get_lines()[1].get_ydata().tolist() == [10, 30, 60, 60]
    assert confidences({}) is None


def test_the_page_shows_it_all_and_escapes_questions(record):
    page = render([record], "Calibration", report_sections())
    for text in ("Sem2-ECE", "Reliability of Sem1", "Reliability of Sem2", "Confidences", "noise floor"):
        assert text in page
    assert "the poet of &lt;b&gt; ?" in page
