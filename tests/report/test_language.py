"""The table and the figures of language models: numbers where they belong, nothing where there is nothing."""

from __future__ import annotations

import pytest

from poise.observe.rows import Rows, read_rows
from poise.report.language import SECTION, curves
from poise.report.record import RunRecord

SUMMARY = {
    "objective": "gem (linear, beta 0.7)", "tuning": "lora (rank 4)", "seed": 2, "step": 96, "best_step": 16,
    "selected": "best", "tokens": {"learned_from": 15_360}, "tokens_per_answer": 2.5,
}  # fmt: skip
WORLD = {
    "floor": 0.61, "measured": {"ce": 0.3, "entropy": 0.31, "answer_ce": 0.82, "excess": 0.21, "answer_entropy": 0.62}
}  # fmt: skip


def rows(**values: float):
    table = Rows()
    for step in (1, 2, 3):
        table.add(step, step / 3, "train", {"ce": 1 / step, "entropy": 0.1})
        table.add(step, step / 3, "validation", {name: value * step for name, value in values.items()})
    return read_rows([table.to_parquet()])


def lines(*records: RunRecord) -> list[tuple[str, list[str]]]:
    (grid,) = SECTION.grids(records)
    assert all(len(line.cells) == len(grid.columns) for line in grid.lines)
    return [(line.note, [cell.text for cell in line.cells]) for line in grid.lines]


def test_a_run_in_a_world_beside_one_on_files_and_one_under_way():
    in_world = RunRecord("a", summary={**SUMMARY, **WORLD})
    on_files = RunRecord("b", summary={**SUMMARY, "floor": None, "measured": {"ce": 2.0, "entropy": 1.5}})
    first, second, third = lines(in_world, on_files, RunRecord("c"))
    assert first == (
        "gem (linear, beta 0.7), lora (rank 4), best, step 16, seed 2",
        ["15,360", "0.300", "0.310", "0.610", "0.210", "0.620"],
    )
    assert second[1] == ["15,360", "2.000", "1.500", *["\u2013"] * 3]
    assert third == ("not finished", ["\u2013"] * 6)


def test_without_a_world_there_are_no_columns_of_one():
    ((_, cells),) = lines(RunRecord("b", summary={**SUMMARY, "measured": {}}))
    assert cells == ["15,360", "\u2013", "\u2013"]


def test_curves_are_in_the_unit_of_the_floor():
    figure = curves(rows(answer_ce=0.5), "ce", "answer_ce", 2.5, 0.61)
    (axes,) = figure.axes
    train, held_out, floor = axes.lines
    assert list(train.get_ydata()) == pytest.approx([2.5, 1.25, 2.5 / 3])
    assert list(held_out.get_ydata()) == [0.5, 1.0, 1.5]
    assert set(floor.get_ydata()) == {0.61}
    assert axes.get_ylabel() == "nats per answer"


def test_figures_of_a_run_with_and_without_rows():
    details = list(SECTION.details("run-1", RunRecord("a", summary={**SUMMARY, **WORLD}, rows=rows(answer_ce=0.5))))
    assert [drawn.title for drawn in details if drawn] == ["Cross entropy", "Entropy"]
    assert list(SECTION.details("run-1", RunRecord("a"))) == [None, None]
