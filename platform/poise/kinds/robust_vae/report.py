"""Tables and figures of autoencoders: the evidence lower bound, and its curves over the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
import pyarrow as pa
from matplotlib.figure import Figure

from poise.kinds.robust_vae.result import RobustVaeResult
from poise.report.blocks import Column, RenderedFigure, Row, Section, Table, draw, number
from poise.report.curves import INK, SPARE, curve
from poise.report.figures import HALF, STYLE, legend, new_figure
from poise.report.record import RunRecord

__all__ = ["SECTION"]


def _tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    measures = ("elbo", "reconstruction", "kl", "error")
    yield Table(
        title="Autoencoders on test images: evidence lower bound, nats per image",
        caption="Evidence lower bound (ELBO) of the test images given their labels, in nats per image, and the two "
        "terms that it is the negative sum of; pixels are normal around the decoded image. Error: mean squared pixel "
        "difference of the reconstruction.",
        heading="run",
        columns=[*map(Column, ("ELBO", "reconstruction", "KL", "error"))],
        rows=[_row(record, measures) for record in records],
    )


def _row(record: RunRecord, measures: Sequence[str]) -> Row:
    result = record.result
    if not isinstance(result, RobustVaeResult):
        return Row(record.name, "not finished", [number(None) for _ in measures])
    cells = [number(result.measured.get(measure), form=".4g") for measure in measures]
    return Row(record.name, result.objective, cells)


def _details(anchor: str, record: RunRecord) -> Iterator[RenderedFigure | None]:
    caption = "Of training batches and of held-out images, in nats per image."
    yield draw(f"{anchor}-elbo", "Evidence lower bound", _elbo(record.rows), caption)


@matplotlib.rc_context(STYLE)
def _elbo(rows: pa.Table) -> Figure | None:
    figure, axes = new_figure(HALF, 2.9, "epoch", "nats per image")
    batches = curve(rows, "train", "elbo").downsample()
    held_out = curve(rows, "validation", "elbo").downsample()
    if len(batches):
        axes.plot(batches.epochs, batches.values, color=SPARE[1], lw=1.2, label="training batches")
    if len(held_out):
        axes.plot(held_out.epochs, held_out.values, color=INK, marker=".", markersize=5, label="held out")
    if not axes.lines:
        return None
    legend(axes)
    return figure


SECTION = Section("Autoencoders", RobustVaeResult, tables=_tables, details=_details, drawn=("elbo",))
