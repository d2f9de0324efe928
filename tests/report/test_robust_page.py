"""Averaged models, best minus final, and the monitors on the page of a robust training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from poise.kinds.robust_train import figures as figures_robust
from poise.kinds.robust_train.report import SECTION
from poise.kinds.robust_train.result import EarlyStopResult, RobustTrainResult
from poise.observe.rows import Rows, read_rows, schema
from poise.report.record import RunRecord


def _watched():
    rows = Rows()
    for step, gap, alarm in ((4, 0.1, 0), (8, 0.3, 1)):
        rows.add(step, step / 4, "validation", {"gap/linf": gap, "gap/clean": gap / 2})
        probe = {"fgsm": 0.9, "pgd": 0.5 - gap, "cosine": 0.8, "alarm": alarm}
        rows.add(step, step / 4, "train", {f"overfitting/{name}": value for name, value in probe.items()})
        rows.add(step, step / 4, "train", {"sum_lr": 0.1 * step})
    return read_rows([rows.to_parquet()])


def test_an_averaged_model_has_its_line_and_the_difference_a_table(make_record: Callable[..., RunRecord]) -> None:
    record = make_record()
    assert isinstance(record.result, RobustTrainResult)
    accuracy = record.result.accuracy
    averaged = {name: value + 0.02 for name, value in accuracy["final"].items()}
    result = record.result.model_copy(
        update={
            "accuracy": {**accuracy, "averaged": averaged},
            "best_minus_final": {name: accuracy["best"][name] - value for name, value in accuracy["final"].items()},
            "stopped": EarlyStopResult(step=1080, why="catastrophic overfitting"),
        }
    )
    main, differences, *_ = SECTION.tables([replace(record, result=result)])
    (line,) = [line for line in main.rows if line.note.startswith("averaged")]
    assert line.cells[0].text == "92.0"
    assert not line.selected
    (row,) = differences.rows
    assert [cell.text for cell in row.cells] == ["+1.3"] * 6
    assert row.note == "stopped at step 1,080: catastrophic overfitting"


def test_the_curves_of_the_monitors_are_their_rows() -> None:
    rows = _watched()
    gap = figures_robust.gap_curves(rows)
    np.testing.assert_array_equal([line.get_ydata() for line in gap.axes[0].lines[:2]], [[0.05, 0.15], [0.1, 0.3]])
    looks = figures_robust.overfitting_curves(rows).axes[0].lines
    np.testing.assert_allclose([line.get_ydata() for line in looks[:3]], [[0.9, 0.9], [0.4, 0.2], [0.8, 0.8]])
    assert [list(line.get_xdata()) for line in looks if line.get_gid() == "alarm"] == [[2.0, 2.0]]
    np.testing.assert_allclose(figures_robust.step_sizes(rows).axes[0].lines[0].get_ydata(), [0.4, 0.8])


def test_without_monitors_nothing_is_drawn(make_record: Callable[..., RunRecord]) -> None:
    empty = schema().empty_table()
    for figure in (figures_robust.gap_curves, figures_robust.overfitting_curves, figures_robust.step_sizes):
        assert figure(empty) is None
    assert len(list(SECTION.tables([make_record()]))) == 2  # accuracies and attacks
