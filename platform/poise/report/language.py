"""How runs that train a language model are shown: cross entropy and entropy, in a world beside the truth's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
import pyarrow as pa
from matplotlib.figure import Figure

from poise.report.blocks import Cell, Column, Drawn, Grid, Line, Section, draw, number, warning_grids
from poise.report.curves import INK, SPARE, curve
from poise.report.figures import HALF, MUTED, STYLE, canvas, legend
from poise.report.record import RunRecord

__all__ = ["SECTION", "curves"]

_PER_TOKEN = {"ce": "CE / token", "entropy": "H / token"}
_PER_ANSWER = {"floor": "floor", "excess": "excess", "answer_entropy": "H / answer"}


def _grids(records: Sequence[RunRecord]) -> Iterator[Grid]:
    in_worlds = any(record.summary.get("floor") is not None for record in records)
    measures = {**_PER_TOKEN, **(_PER_ANSWER if in_worlds else {})}
    yield Grid(
        title="Cross entropy (CE) and entropy (H) on held-out text, nats",
        caption="Cross entropy of held-out completions and entropy H of the model where it answers, in nats. Per "
        "answer it is measured against the true answers of the world, without noise: no model is below the floor, "
        "which is also their entropy, and the excess is the Kullback-Leibler divergence from the truth.",
        heading="run",
        columns=[*map(Column, ("tokens", *measures.values()))],
        lines=[_line(record, list(measures)) for record in records],
    )
    yield from warning_grids(records)


def _line(record: RunRecord, measures: Sequence[str]) -> Line:
    told = record.summary
    if not told:
        return Line(record.name, "not finished", [Cell("\u2013")] * (1 + len(measures)))
    values = {"floor": told.get("floor"), **told["measured"]}
    step = told["best_step"] if told["selected"] == "best" else told["step"]
    note = f"{told['objective']}, {told['tuning']}, {told['selected']}, step {step:,}, seed {told['seed']}"
    tokens = Cell(f"{told['tokens']['learned_from']:,}")
    return Line(record.name, note, [tokens, *(number(values.get(measure)) for measure in measures)])


def _details(anchor: str, record: RunRecord) -> Iterator[Drawn | None]:
    floor, scale = record.summary.get("floor"), record.summary.get("tokens_per_answer", 1.0)
    for train, title, what in (
        ("ce", "Cross entropy", "cross entropy of the answers"),
        ("entropy", "Entropy", "entropy of the model where it answers"),
    ):
        of_world = floor is not None
        figure = curves(record.rows, train, f"answer_{train}" if of_world else train, scale if of_world else 1.0, floor)
        yield draw(f"{anchor}-{train}", title, figure,
                   f"The {what}, in training batches and held out"
                   + (", per answer; the line is that of the truth." if of_world else ", per token."))  # fmt: skip


@matplotlib.rc_context(STYLE)
def curves(rows: pa.Table, train: str, validation: str, scale: float, floor: float | None) -> Figure | None:
    """One measure in training, times `scale`, and held out, over epochs, with a line at `floor`; None without any."""
    figure, axes = canvas(HALF, 2.9, "epoch", "nats per token" if floor is None else "nats per answer")
    batches, held_out = curve(rows, "train", train).thinned(), curve(rows, "validation", validation).thinned()
    if len(batches):
        axes.plot(batches.epochs, scale * batches.values, color=SPARE[1], lw=1.2, label="training batches")
    if len(held_out):
        axes.plot(held_out.epochs, held_out.values, color=INK, marker=".", markersize=5, label="held out")
    if not axes.lines:
        return None
    if floor is not None:
        axes.axhline(floor, color=MUTED, lw=1, ls=(0, (4, 3)), label="truth", gid="floor")
    top = 1.2 * max(held_out.values, default=0.0)  # what counts is near the end; training begins far above it
    axes.set_ylim(0, max(top, 2.5 * floor) if floor is not None and top else None)
    legend(axes)
    return figure


SECTION = Section("Language models", _grids, lambda records: (), _details, unit="examples")
