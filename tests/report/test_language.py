"""The table and the figures of language models: numbers where they belong, nothing where there is nothing."""

from __future__ import annotations

import pytest

from poise.kinds.finetune_sft.report import SECTION, curves
from poise.kinds.finetune_sft.result import FinetuneSftResult, TokenCounts
from poise.observe.rows import Rows, read_rows
from poise.report.record import RunRecord

WORLD = {"ce": 0.3, "entropy": 0.31, "answer_ce": 0.82, "excess": 0.21, "answer_entropy": 0.62}
FLOOR = 0.61


def result_of(measured: dict[str, float], floor: float | None = None) -> FinetuneSftResult:
    """The result of a run, in a world where there is a floor."""
    return FinetuneSftResult(
        run="a",
        seed=2,
        objective="gem (linear, beta 0.7)",
        tuning="lora (rank 4)",
        trainable=1_024,
        step=96,
        best_step=16,
        selected="best",
        parameters=65_536,
        measured=measured,
        floor=floor,
        tokens=TokenCounts(examples=64, all=640, supervised=160, learned_from=15_360),
        supervised_share=0.25,
        tokens_per_answer=2.5,
        preview=[],
    )


def rows(**values: float):
    table = Rows()
    for step in (1, 2, 3):
        table.add(step, step / 3, "train", {"ce": 1 / step, "entropy": 0.1})
        table.add(step, step / 3, "validation", {name: value * step for name, value in values.items()})
    return read_rows([table.to_parquet()])


def lines(*records: RunRecord) -> list[tuple[str, list[str]]]:
    (table,) = SECTION.tables(records)
    assert all(len(line.cells) == len(table.columns) for line in table.rows)
    return [(line.note, [cell.text for cell in line.cells]) for line in table.rows]


def test_a_run_in_a_world_beside_one_on_files_and_one_under_way():
    in_world = RunRecord("a", result=result_of(WORLD, FLOOR))
    on_files = RunRecord("b", result=result_of({"ce": 2.0, "entropy": 1.5}))
    first, second, third = lines(in_world, on_files, RunRecord("c"))
    assert first == (
        "gem (linear, beta 0.7), lora (rank 4), best, step 16, seed 2",
        ["15,360", "0.300", "0.310", "0.610", "0.210", "0.620"],
    )
    assert second[1] == ["15,360", "2.000", "1.500", *["\u2013"] * 3]
    assert third == ("not finished", ["\u2013"] * 6)


def test_without_a_world_there_are_no_columns_of_one():
    ((_, cells),) = lines(RunRecord("b", result=result_of({})))
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
    details = list(SECTION.details("run-1", RunRecord("a", result=result_of(WORLD, FLOOR), rows=rows(answer_ce=0.5))))
    assert [drawn.title for drawn in details if drawn] == ["Cross entropy", "Entropy"]
    assert list(SECTION.details("run-1", RunRecord("a"))) == [None, None]
