"""Tables and figures of self-play: exploitability of the policy before, during and after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.figure import Figure

from poise.kinds.align_selfplay.result import AlignSelfplayResult
from poise.report.blocks import Cell, Column, RenderedFigure, Row, Section, Table, draw, number, percent, warning_tables
from poise.report.curves import COLORS, INK, SPARE, curve, names
from poise.report.figures import HALF, STYLE, WIDE, legend, new_figure
from poise.report.record import RunRecord

__all__ = ["SECTION"]

_COLUMNS = ("before", "after", "listed", "from NE", "from reg. NE", "policy", "NE")


def _tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    yield Table(
        title="Self-play: exploitability, means over the questions",
        caption="Exploitability before and after: by how much the best response to the policy wins above 1/2, exact, "
        "mean over the questions; 0 at an equilibrium (NE). Listed: probability in percent of the answers that the "
        "oracle ranks; any other text counts as one that loses. From NE: total variation from the equilibrium of the "
        "game, and from the one regularised towards the reference, where the method aims at that. Policy: mean "
        "probability in percent of the first, second, ... answer.",
        heading="run",
        columns=[Column(label, in_terminal=label != "from reg. NE") for label in _COLUMNS],
        rows=[_row(record) for record in records],
    )
    yield from warning_tables(records)


def _row(record: RunRecord) -> Row:
    result = record.result
    if not isinstance(result, AlignSelfplayResult):
        return Row(record.name, "not finished", [Cell("\u2013")] * len(_COLUMNS))
    cells = [
        number(result.start.exploitability),
        number(result.final.exploitability),
        percent(1 - result.final.outside),
        number(result.final.distance),
        number(result.final.distance_regularised),
        _mixture(result.final.policy),
        _mixture(result.equilibrium),
    ]
    return Row(record.name, f"{result.method}, seed {result.seed}", cells)


def _mixture(policy: Sequence[float]) -> Cell:
    """The probabilities of the listed answers in percent; the last entry, of all other texts, is in another column."""
    return Cell(" / ".join(f"{100 * share:.0f}" for share in policy[:-1]))


def _figures(records: Sequence[RunRecord]) -> Iterator[RenderedFigure | None]:
    caption = (
        "Mean over the questions of what the best response to the policy wins above 1/2, from the initial policy of "
        "each run. A method that cycles stays away from 0."
    )
    yield draw("exploitability", "Exploitability", _exploitability(records), caption)


@matplotlib.rc_context(STYLE)
def _exploitability(records: Sequence[RunRecord]) -> Figure | None:
    figure, axes = new_figure(WIDE, 3.4, "iteration", "exploitability")
    palette = (*COLORS.values(), *SPARE)
    for index, record in enumerate(records):
        series = curve(record.rows, "validation", "exploitability").downsample()
        if len(series):
            color = palette[index % len(palette)]
            axes.plot(series.epochs, series.values, color=color, marker=".", markersize=5, label=record.name)
    if not axes.lines:
        return None
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def _details(anchor: str, record: RunRecord) -> Iterator[RenderedFigure | None]:
    caption = "KL divergence from each policy of the regularizer, estimated on the responses of the training batches."
    yield draw(f"{anchor}-kl", "Divergence", _divergences(record), caption)


@matplotlib.rc_context(STYLE)
def _divergences(record: RunRecord) -> Figure | None:
    figure, axes = new_figure(HALF, 2.9, "iteration", "nats per response")
    palette = (INK, *SPARE[1:])
    for index, name in enumerate(names(record.rows, "train", "kl/")):
        series = curve(record.rows, "train", f"kl/{name}").downsample()
        axes.plot(series.epochs, series.values, color=palette[index % len(palette)], lw=1.2, label=name)
    if not axes.lines:
        return None
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


SECTION = Section("Self-play", AlignSelfplayResult, _tables, _figures, _details, unit="responses", drawn=("kl/*",))
