from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure

from poise.observe.rows import Rows, read_rows, schema
from poise.report import figures
from poise.report.curves import COLORS, curve
from poise.report.record import RunRecord
from poise.stats import wilson

EMPTY = schema().empty_table()


def _line(figure: Figure, tone: str, style: str = "-") -> np.ndarray:
    """The points of the one plotted line of a colour and style."""
    lines = [line for line in figure.axes[0].lines if line.get_color() == tone and line.get_linestyle() == style]
    (line,) = (line for line in lines if line.get_gid() != "best")
    return np.asarray(line.get_xydata())


def test_the_curves_are_the_rows(make_record: Callable[..., RunRecord]) -> None:
    rows = make_record().rows
    for draw, split, prefix in (
        (figures.loss_curves, "train", "loss/"),
        (figures.weight_curves, "train", "weight/"),
        (figures.accuracy_curves, "validation", "robust/"),
    ):
        figure = draw(rows)
        assert figure is not None
        for threat in ("linf", "l2", "l1"):
            series = curve(rows, split, prefix + threat)
            np.testing.assert_array_equal(_line(figure, COLORS[threat])[:, 0], series.epochs)
            np.testing.assert_array_equal(_line(figure, COLORS[threat])[:, 1], series.values)
    dotted = _line(figure, COLORS["linf"], "--")
    np.testing.assert_array_equal(dotted[:, 1], curve(rows, "train", "robust/linf").values)


def test_the_best_checkpoint_is_marked_at_its_validation(make_record: Callable[..., RunRecord]) -> None:
    rows = Rows()
    rows.add(450, 0.0, "test", {"clean": 0.5})
    record = make_record()
    table = read_rows([rows.to_parquet()])
    import pyarrow as pa

    figure = figures.accuracy_curves(pa.concat_tables([table, record.rows]), best_step=450)
    assert figure is not None
    (mark,) = (line for line in figure.axes[0].lines if line.get_gid() == "best")
    assert list(mark.get_xdata()) == [10.0, 10.0]
    unmarked = figures.accuracy_curves(record.rows, best_step=449)
    assert unmarked is not None
    assert not [line for line in unmarked.axes[0].lines if line.get_gid() == "best"]


def test_bars_have_the_heights_and_intervals_given() -> None:
    runs = [("a", {"clean": 0.9, "linf": 0.5}, 100), ("b", {"clean": 0.8, "linf": math.nan}, 400)]
    figure = figures.final_bars(runs)
    assert figure is not None
    axes = figure.axes[0]
    bars = sorted((patch.get_x(), patch.get_height()) for patch in axes.patches)
    assert [height for _, height in bars] == [0.9, 0.8, 0.5]
    ends = {tuple(np.round(path.vertices[:, 1], 9)) for c in axes.collections for path in c.get_paths()}
    assert ends == {tuple(np.round(wilson(*pair), 9)) for pair in ((0.9, 100), (0.8, 400), (0.5, 100))}


def test_phase_bars_add_up(make_record: Callable[..., RunRecord]) -> None:
    figure = figures.phase_bars([("a", make_record().rows), ("none", EMPTY)])
    assert figure is not None
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == pytest.approx([12 * s for s in (0.1, 4.0, 1.9, 0.4, 0.2)])


@pytest.mark.parametrize(
    "draw", [figures.loss_curves, figures.accuracy_curves, figures.weight_curves, figures.learning_rate, figures.speed]
)
def test_no_rows_no_figure(draw: Callable[..., Figure | None]) -> None:
    assert draw(EMPTY) is None
    assert figures.phase_bars([("a", EMPTY)]) is None
    assert figures.final_bars([("a", {}, 10), ("b", {"clean": math.nan}, 10)]) is None


def test_a_single_threat_is_drawn_once() -> None:
    rows = Rows()
    for step in (1, 2):
        same = {"robust/linf": 0.5, "robust/union": 0.5, "robust/average": 0.5}
        rows.add(step, float(step), "train", {"loss": 1.0, "loss/linf": 1.0, "weight/linf": 1.0, **same})
    table = read_rows([rows.to_parquet()])
    assert figures.weight_curves(table) is None
    for draw in (figures.loss_curves, figures.accuracy_curves):
        figure = draw(table)
        assert figure is not None
        assert len(figure.axes[0].lines) == 1


def test_an_odd_run_is_drawn() -> None:
    rows = Rows()
    rows.add(1, 1.0, "train", {"loss": math.nan, "loss/linf": math.inf, "weight/new": 1.0, "weight/l1": 0.0, "lr": 0.0})
    rows.add(1, 1.0, "validation", {"robust/$\\frac{": 0.5, "robust/<b>": math.nan})
    table = read_rows([rows.to_parquet()])
    for draw in (figures.loss_curves, figures.weight_curves, figures.learning_rate, figures.accuracy_curves):
        figure = draw(table)
        assert figure is not None
        ET.fromstring(figures.to_svg(figure, "odd", "odd"))
    assert "&lt;b&gt;" in figures.to_svg(figure, "odd", "odd")


def test_svg_is_deterministic_labelled_and_follows_the_page(make_record: Callable[..., RunRecord]) -> None:
    def draw(name: str) -> str:
        figure = figures.weight_curves(make_record().rows)
        assert figure is not None
        return figures.to_svg(figure, name, 'weights "of" <threats>')

    svg = draw("a")
    assert svg == draw("a")
    root = ET.fromstring(svg)
    assert root.get("aria-label") == 'weights "of" <threats>'
    assert root.get("role") == "img"
    assert not set(re.findall(r'id="([^"]*)"', svg)) & set(re.findall(r'id="([^"]*)"', draw("b")))
    assert f"var(--c-{COLORS['linf'][1:]}, {COLORS['linf']})" in svg
    assert "http" not in svg
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg))
    for pair in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg):
        assert f'id="{"".join(pair)}"' in svg


def test_every_metric_of_training_that_no_other_figure_draws_has_axes_of_its_own() -> None:
    rows = Rows()
    for step in (1, 2):
        known = {"loss": 1.0, "loss/linf": 1.0, "lr": 0.1, "sum_lr": 0.1, "robust/linf": 0.5, "weight/linf": 1.0}
        rows.add(step, step / 2, "train", {**known, "running/adversarial": 3.0 * step, "gap": 0.1})
        rows.add(step, step / 2, "validation", {"clean": 0.9})
    table = read_rows([rows.to_parquet()])
    figure = figures.further_curves(table, ("robust/*", "weight/*"))
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["gap", "running/adversarial"]
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_xydata(), [[0.5, 3.0], [1.0, 6.0]])
    assert figures.further_curves(table, ("*",)) is None
    assert figures.further_curves(EMPTY, ()) is None
