"""Tables and figures of supervised fine-tuning: cross entropy and entropy, in a world beside the true values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
import pyarrow as pa
from matplotlib.figure import Figure

from poise.kinds.finetune_sft.result import FinetuneSftResult
from poise.report.blocks import (
    Cell,
    Column,
    RenderedFigure,
    Row,
    Section,
    Table,
    draw,
    metric_tables,
    number,
    warning_tables,
)
from poise.report.curves import INK, SPARE, curve
from poise.report.figures import HALF, MUTED, STYLE, legend, new_figure
from poise.report.record import RunRecord, with_result

__all__ = ["SECTION", "curves"]

_PER_TOKEN = {"ce": "CE / token", "entropy": "H / token"}
_PER_ANSWER = {"floor": "floor", "excess": "excess", "answer_entropy": "H / answer"}


def _tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    results = with_result(records, FinetuneSftResult)
    in_worlds = any(result.floor is not None for _, result in results)
    measures = {**_PER_TOKEN, **(_PER_ANSWER if in_worlds else {})}
    yield Table(
        title="Cross entropy (CE) and entropy (H) on held-out text, nats",
        caption="Tokens are those that the training has learned from. Cross entropy of held-out completions and "
        "entropy H of the model where it answers, in nats. Per answer, cross entropy is exact against the true answers "
        "of the world: the floor is their entropy, the lowest possible value, and the excess over it is the "
        "Kullback-Leibler divergence from the true distribution.",
        heading="run",
        columns=[*map(Column, ("tokens", *measures.values()))],
        rows=[_row(record, list(measures)) for record in records],
    )
    yield from metric_tables({record.name: result.measured for record, result in results})
    yield from warning_tables(records)


def _row(record: RunRecord, measures: Sequence[str]) -> Row:
    result = record.result
    if not isinstance(result, FinetuneSftResult):
        return Row(record.name, "not finished", [Cell("\u2013")] * (1 + len(measures)))
    values = {"floor": result.floor, **result.measured}
    step = result.step_of(result.selected)
    note = f"{result.objective}, {result.tuning}, {result.selected}, step {step:,}, seed {result.seed}"
    tokens = Cell(f"{result.tokens.learned_from:,}")
    return Row(record.name, note, [tokens, *(number(values.get(measure)) for measure in measures)])


def _details(anchor: str, record: RunRecord) -> Iterator[RenderedFigure | None]:
    result = record.result if isinstance(record.result, FinetuneSftResult) else None
    floor = result.floor if result else None
    scale = result.tokens_per_answer if result else 1.0
    for measure, title, description in (
        ("ce", "Cross entropy", "cross entropy of the answers"),
        ("entropy", "Entropy", "entropy of the model where it answers"),
    ):
        if floor is None:
            figure = curves(record.rows, measure, measure, 1.0, None)
            caption = f"The {description}, in training batches and held out, per token."
        else:
            figure = curves(record.rows, measure, f"answer_{measure}", scale, floor)
            caption = (
                f"The {description}, in training batches and held out, per answer; the line is the value of the true "
                "distribution."
            )
        yield draw(f"{anchor}-{measure}", title, figure, caption)


@matplotlib.rc_context(STYLE)
def curves(rows: pa.Table, train: str, validation: str, scale: float, floor: float | None) -> Figure | None:
    """One measure over epochs: in training batches, times `scale`, and held out; a line at `floor` if there is one.

    None where the run has neither series.
    """
    figure, axes = new_figure(HALF, 2.9, "epoch", "nats per token" if floor is None else "nats per answer")
    batches = curve(rows, "train", train).downsample()
    held_out = curve(rows, "validation", validation).downsample()
    if len(batches):
        axes.plot(batches.epochs, scale * batches.values, color=SPARE[1], lw=1.2, label="training batches")
    if len(held_out):
        axes.plot(held_out.epochs, held_out.values, color=INK, marker=".", markersize=5, label="held out")
    if not axes.lines:
        return None
    if floor is not None:
        axes.axhline(floor, color=MUTED, lw=1, ls=(0, (4, 3)), label="truth", gid="floor")
    # The axis shows the range of the held-out values: training batches begin far above it.
    top = 1.2 * max(held_out.values, default=0.0)
    axes.set_ylim(0, max(top, 2.5 * floor) if floor is not None and top else None)
    legend(axes)
    return figure


SECTION = Section(
    "Language models", FinetuneSftResult, tables=_tables, details=_details, unit="examples", drawn=("ce", "entropy")
)
