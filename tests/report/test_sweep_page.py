"""The page of a sweep: its trials in order, and a figure for what was varied."""

from __future__ import annotations

from dataclasses import replace

import pytest

from poise.kinds import report_sections
from poise.kinds.sweep.report import SECTION
from poise.kinds.sweep.result import SweepResult, TrialResult
from poise.report.page import render
from poise.report.record import RunRecord
from poise.stats import wilson


def trial(index: int, eps: object, metric: float | None, status: str = "finished") -> TrialResult:
    test = {"clean": 0.9, "robust/linf": 0.5, "robust/average": 0.5, "robust/union": 0.5} if metric else {}
    step, error = (40, None) if metric else (None, "broke")
    values = {"threats.linf.eps": eps, "train.epochs": 2}
    return TrialResult(
        run=f"s-{index:04d}", status=status, values=values, metric=metric, step=step, test=test, error=error
    )


@pytest.fixture
def record() -> RunRecord:
    trials = [trial(0, "8/255", 0.25), trial(1, 0.1, None, "failed"), trial(2, "1/5", 0.75, "stopped")]
    result = SweepResult(
        run="s",
        seed=0,
        metric="robust/union",
        mode="max",
        judgement={"metric": "robust/union"},
        judged_by="robust/union",
        judged_on="validation",
        best="s-0002",
        failed=["s-0001"],
        trials=trials,
        parts=[one.run for one in trials],
    )
    return RunRecord(name="s", kind="sweep", status="finished", result=result)


def changed(record: RunRecord, **fields: object) -> RunRecord:
    """The same run with other fields in its result."""
    assert record.result is not None
    return replace(record, result=record.result.model_copy(update=fields))


def test_trials_stand_best_first_with_values_as_written(record):
    (table,) = SECTION.tables([record])
    assert [line.head for line in table.rows] == ["s-0002", "s-0000", "s-0001"]
    assert [column.label for column in table.columns][:4] == ["linf.eps", "train.epochs", "robust/union", "test clean"]
    assert len(table.columns) == 5  # average and union of one threat are that threat
    assert [cell.text for cell in table.rows[0].cells] == ["1/5", "2", "75.0", "90.0", "50.0"]
    assert [line.cells[2].top for line in table.rows] == [True, False, False]
    assert "failed, broke" in table.rows[2].note
    falling = changed(record, mode="min")
    assert next(iter(SECTION.tables([falling]))).rows[0].head == "s-0000"


def test_shares_have_their_intervals_and_the_page_says_by_what_trials_are_judged(record):
    judged = "robust/union on the validation split under the attacks of training"
    trials = [one.model_copy(update={"num_examples": 40, "num_tested": 200}) for one in record.result.trials]
    honest = changed(record, trials=trials, judged_by=judged, judged_on="validation")
    (table,) = SECTION.tables([honest])
    low, high = wilson(0.75, 40)
    assert table.rows[0].cells[2].below == f"{100 * low:.1f}\u2013{100 * high:.1f}"
    low, high = wilson(0.5, 200)
    assert table.rows[0].cells[4].below == f"{100 * low:.1f}\u2013{100 * high:.1f}"
    assert table.rows[0].cells[2].top
    assert f"judged by {judged}" in table.caption
    assert "the first of 3 is not corrected for the choice" in table.caption


def test_a_winner_that_the_test_has_chosen_is_not_marked_and_the_page_says_so(record):
    (table,) = SECTION.tables([changed(record, judged_on="test")])
    assert [line.cells[2].top for line in table.rows] == [False] * 3
    assert "no images are left that had no part in the choice" in table.caption
    assert "chosen by the test" in table.title


def test_the_page_has_a_figure_of_what_was_varied(record):
    page = render([record], "s", report_sections())
    assert "threats.linf.eps" in page
    assert "Every trial that has the metric" in page
    nothing = changed(record, trials=[trial(0, "eight", None, "failed")])
    assert list(SECTION.rendered_figures([nothing])) == [None]


def test_values_that_are_no_numbers_have_places_of_their_own(record):
    trials = [trial(0, {"name": "at"}, 0.2), trial(1, {"name": "avg"}, 0.3)]
    words = changed(record, trials=trials)
    assert "name avg" in render([words], "s", report_sections())
