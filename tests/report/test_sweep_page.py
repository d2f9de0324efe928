"""The page of a sweep: its trials in order, and a figure for what was varied."""

from __future__ import annotations

from dataclasses import replace

import pytest

from poise.report.page import render
from poise.report.record import RunRecord
from poise.report.sweep import SECTION
from poise.stats import wilson


def trial(index: int, eps: object, metric: float | None, status: str = "finished") -> dict[str, object]:
    test = {"clean": 0.9, "robust/linf": 0.5, "robust/average": 0.5, "robust/union": 0.5} if metric else {}
    step, error = (40, None) if metric else (None, "broke")
    values = {"threats.linf.eps": eps, "train.epochs": 2}
    found = {"run": f"s-{index:04d}", "status": status, "values": values, "metric": metric, "step": step}
    return {**found, "test": test, "error": error}


@pytest.fixture
def record() -> RunRecord:
    trials = [trial(0, "8/255", 0.25), trial(1, 0.1, None, "failed"), trial(2, "1/5", 0.75, "stopped")]
    summary = {"metric": "robust/union", "mode": "max", "best": "s-0002", "trials": trials}
    return RunRecord(name="s", kind="sweep", status="finished", summary=summary)


def test_trials_stand_best_first_with_values_as_written(record):
    (grid,) = SECTION.grids([record])
    assert [line.head for line in grid.lines] == ["s-0002", "s-0000", "s-0001"]
    assert [column.label for column in grid.columns][:4] == ["linf.eps", "train.epochs", "robust/union", "test clean"]
    assert len(grid.columns) == 5  # average and union of one threat are that threat
    assert [cell.text for cell in grid.lines[0].cells] == ["1/5", "2", "75.0", "90.0", "50.0"]
    assert [line.cells[2].top for line in grid.lines] == [True, False, False]
    assert "failed, broke" in grid.lines[2].note
    falling = replace(record, summary={**record.summary, "mode": "min"})
    assert next(iter(SECTION.grids([falling]))).lines[0].head == "s-0000"


def test_shares_have_their_intervals_and_the_page_says_by_what_trials_are_judged(record):
    judged = "robust/union on the validation split under the attacks of training"
    trials = [one | {"examples": 40, "tested": 200} for one in record.summary["trials"]]
    honest = replace(
        record, summary={**record.summary, "trials": trials, "judged_by": judged, "judged_on": "validation"}
    )
    (grid,) = SECTION.grids([honest])
    low, high = wilson(0.75, 40)
    assert grid.lines[0].cells[2].below == f"{100 * low:.1f}\u2013{100 * high:.1f}"
    low, high = wilson(0.5, 200)
    assert grid.lines[0].cells[4].below == f"{100 * low:.1f}\u2013{100 * high:.1f}"
    assert grid.lines[0].cells[2].top
    assert f"judged by {judged}" in grid.caption
    assert "the first of 3 is not corrected for the choice" in grid.caption


def test_a_winner_that_the_test_has_chosen_is_not_marked_and_the_page_says_so(record):
    (grid,) = SECTION.grids([replace(record, summary={**record.summary, "judged_on": "test"})])
    assert [line.cells[2].top for line in grid.lines] == [False] * 3
    assert "no images are left that had no part in the choice" in grid.caption
    assert "chosen by the test" in grid.title


def test_the_page_has_a_figure_of_what_was_varied(record):
    page = render([record], "s")
    assert "threats.linf.eps" in page
    assert "Every trial that has the metric" in page
    nothing = replace(record, summary={**record.summary, "trials": [trial(0, "eight", None, "failed")]})
    assert list(SECTION.drawings([nothing])) == [None]


def test_values_that_are_no_numbers_have_places_of_their_own(record):
    trials = [trial(0, {"name": "at"}, 0.2), trial(1, {"name": "avg"}, 0.3)]
    words = replace(record, summary={**record.summary, "trials": trials})
    assert "name avg" in render([words], "s")
