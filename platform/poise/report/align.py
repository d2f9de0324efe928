"""How runs of self-play are shown: how far the policy can be exploited, before, meanwhile and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.figure import Figure

from poise.report.blocks import Cell, Column, Drawn, Grid, Line, Section, draw, number, percent, warning_grids
from poise.report.curves import COLOURS, INK, SPARE, curve
from poise.report.figures import HALF, STYLE, WIDE, canvas, legend
from poise.report.record import RunRecord

__all__ = ["SECTION"]

_COLUMNS = ("before", "after", "listed", "from NE", "from reg. NE", "policy", "NE")


def _grids(records: Sequence[RunRecord]) -> Iterator[Grid]:
    yield Grid(
        title="Self-play: exploitability, means over the questions",
        caption="Exploitability before and after: what the best answer to the policy wins beyond 1/2, exact, mean over "
        "the questions; 0 at an equilibrium (NE). Listed: probability in percent of the answers that the oracle ranks; "
        "any other text counts as one that loses. From NE: total variation from the equilibrium of the game, and from "
        "the one regularised towards the reference, where the method aims at that. Policy: mean probability in percent "
        "of the first, second, ... answer.",
        heading="run",
        columns=[Column(label, brief=label != "from reg. NE") for label in _COLUMNS],
        lines=[_line(record) for record in records],
    )
    yield from warning_grids(records)


def _line(record: RunRecord) -> Line:
    told = record.summary
    if not told:
        return Line(record.name, "not finished", [Cell("\u2013")] * len(_COLUMNS))
    start, final = told["start"], told["final"]
    note = f"{told['method']}, seed {told['seed']}"
    cells = [
        number(start["exploitability"]),
        number(final["exploitability"]),
        percent(1 - final["outside"]),
        number(final["distance"]),
        number(final.get("distance_regularised")),
        _mixture(final["policy"]),
        _mixture(told["equilibrium"]),
    ]
    return Line(record.name, note, cells)


def _mixture(policy: Sequence[float]) -> Cell:
    """The listed answers' shares in percent; the last entry, of all other texts, has a column of its own."""
    return Cell(" / ".join(f"{100 * share:.0f}" for share in policy[:-1]))


def _drawings(records: Sequence[RunRecord]) -> Iterator[Drawn | None]:
    yield draw("exploitability", "Exploitability", _exploitability(records),
               "Mean over the questions of what the best answer to the policy wins beyond 1/2, from the policy that "
               "each run began with. A method that circles stays away from 0.")  # fmt: skip


@matplotlib.rc_context(STYLE)
def _exploitability(records: Sequence[RunRecord]) -> Figure | None:
    figure, axes = canvas(WIDE, 3.4, "iteration", "exploitability")
    tones = (*COLOURS.values(), *SPARE)
    for index, record in enumerate(records):
        series = curve(record.rows, "validation", "exploitability").thinned()
        if len(series):
            tone = tones[index % len(tones)]
            axes.plot(series.epochs, series.values, color=tone, marker=".", markersize=5, label=record.name)
    if not axes.lines:
        return None
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def _details(anchor: str, record: RunRecord) -> Iterator[Drawn | None]:
    yield draw(f"{anchor}-kl", "Divergence", _divergences(record),
               "KL from what the policy is held to, estimated on the responses of the training batches.")  # fmt: skip


@matplotlib.rc_context(STYLE)
def _divergences(record: RunRecord) -> Figure | None:
    figure, axes = canvas(HALF, 2.9, "iteration", "nats per response")
    for name, tone in (("magnet", INK), ("previous", SPARE[1]), ("reference", INK)):
        series = curve(record.rows, "train", f"kl/{name}").thinned()
        if len(series):
            axes.plot(series.epochs, series.values, color=tone, lw=1.2, label=name)
    if not axes.lines:
        return None
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


SECTION = Section("Self-play", _grids, _drawings, _details, unit="responses")
