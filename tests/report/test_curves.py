from __future__ import annotations

import math

import numpy as np
import pytest

from poise.observe.rows import Rows, read_rows
from poise.report.curves import Curve, color_of, curve, label, names, ordered, phase_seconds


def test_thinning_keeps_means_and_the_ends() -> None:
    steps = np.arange(10_000)
    long = Curve(steps, steps / 100, np.sin(steps / 500))
    thin = long.downsample(400)
    assert len(thin) == 400
    assert thin.steps[-1] == 9_999
    assert thin.values.mean() == pytest.approx(long.values.mean(), abs=1e-12)
    assert thin.values[0] == pytest.approx(long.values[:25].mean())
    assert long.downsample(10_000) is long


def test_thinning_leaves_out_what_is_not_a_number() -> None:
    values = np.array([1.0, math.nan, 3.0, math.inf, math.nan, math.nan])
    thin = Curve(np.arange(6), np.arange(6.0), values).downsample(3)
    assert thin.values[:2].tolist() == [1.0, 3.0]
    assert math.isnan(thin.values[2])


def test_series_are_found_by_split_and_name() -> None:
    rows = Rows()
    rows.add(2, 0.2, "train", {"loss": 2.0, "weight/l1": 0.5, "weight/zebra": 0.1, "weight/linf": 0.4})
    rows.add(1, 0.1, "train", {"loss": 3.0})
    rows.add(2, 0.2, "validation", {"loss": 9.0})
    rows.add(2, 0.2, "timing", {"seconds/data": 1.0, "seconds/attack": math.nan, "examples_per_s": 7.0})
    rows.add(3, 0.3, "timing", {"seconds/data": 2.0})
    table = read_rows([rows.to_parquet()])
    found = curve(table, "train", "loss")
    assert (found.steps.tolist(), found.epochs.tolist(), found.values.tolist()) == ([1, 2], [0.1, 0.2], [3.0, 2.0])
    assert len(curve(table, "test", "loss")) == 0
    assert names(table, "train", "weight/") == ["linf", "l1", "zebra"]
    assert phase_seconds(table) == {"data": 3.0, "attack": 0.0}


def test_measures_have_one_order_and_distinct_colors() -> None:
    assert ordered(["union", "zebra", "l1", "clean", "apple", "linf", "l1"]) == [
        "clean",
        "linf",
        "l1",
        "union",
        "apple",
        "zebra",
    ]
    measures = ["clean", "linf", "l2", "l1", "average", "union", "apple", "zebra"]
    assert len({color_of(measure, measures) for measure in measures}) == len(measures)
    assert label("robust/linf") == "\u2113\u221e"
    assert label("on_manifold") == "on_manifold"
