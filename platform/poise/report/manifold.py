"""How attacks on the data manifold are shown: success on it, off it and anywhere, and the autoencoders behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import pyarrow as pa
from matplotlib.figure import Figure

from poise.report.blocks import Cell, Column, Drawn, Grid, Line, Section, draw, number, percent
from poise.report.curves import INK, SPARE, curve, label
from poise.report.figures import HALF, STYLE, canvas, legend
from poise.report.record import RunRecord

__all__ = ["SECTION"]

_WHERE = ("on", "off", "anywhere")
_DASH = "\u2013"


def _grids(records: Sequence[RunRecord]) -> Iterator[Grid]:
    attacked = [(record, each) for record in records for each in record.summary.get("classifiers") or ()]
    if attacked:
        yield _success(attacked)
    if any(each["latent"] for _, each in attacked):
        yield _codes(attacked)
    trained = [record for record in records if record.kind == "robust.vae"]
    if trained:
        yield _autoencoders(trained)


def _success(attacked: Sequence[tuple[RunRecord, Mapping[str, Any]]]) -> Grid:
    return Grid(
        title="Success of attacks on and off the data manifold, percent",
        caption="Success: share, in percent, of the images that are classified right which an attack in the ball "
        "fools. On: within the eigenspace of the image's class; off: at right angles to it; anywhere: in the whole "
        "ball. Left: the part of the length of the perturbations that lies outside of their subspace, where the box of "
        "the pixels has pushed it; for anywhere, the part that lies off the manifold.",
        heading="network, ball",
        columns=[Column("clean"), *map(Column, _WHERE), *(Column(f"{where} left", brief=False) for where in _WHERE)],
        lines=[_line(record, each, norm) for record, each in attacked for norm in each["attacks"]],
    )


def _line(record: RunRecord, network: Mapping[str, Any], norm: str) -> Line:
    def share(table: str, where: str) -> Cell:
        value = network[table][f"{where}/{norm}"]
        value = value["share"] if isinstance(value, dict) else value
        return Cell(_DASH) if value is None else percent(value)

    dimensions = network["dimensions"]
    note = f"{network['attacks'][norm]}; {dimensions['on']} of {dimensions['anywhere']} dimensions, in {record.name}"
    cells = [percent(network["clean"], network["examples"])]
    cells += [share(table, where) for table in ("success", "departure") for where in _WHERE]
    return Line(f"{network['run']}, {label(norm)}", note, cells)


def _codes(attacked: Sequence[tuple[RunRecord, Mapping[str, Any]]]) -> Grid:
    return Grid(
        title="Attacks on the codes of an autoencoder, percent",
        caption="Accuracy in percent on the reconstructions of the images, and on what their attacked codes decode to. "
        "Success counts only images whose reconstruction is classified right.",
        heading="network",
        columns=[*map(Column, ("images", "reconstructions", "attacked codes", "success"))],
        lines=[_line_of_codes(record, each) for record, each in attacked if each["latent"]],
    )


def _line_of_codes(record: RunRecord, network: Mapping[str, Any]) -> Line:
    latent, n = network["latent"], network["examples"]
    success = Cell(_DASH) if latent["success"] is None else percent(latent["success"])
    accuracies = (network["clean"], latent["reconstruction"], latent["accuracy"])
    return Line(network["run"], record.summary["latent"], [*(percent(value, n) for value in accuracies), success])


def _autoencoders(records: Sequence[RunRecord]) -> Grid:
    measures = ("elbo", "reconstruction", "kl", "error")
    return Grid(
        title="Autoencoders on test images: evidence lower bound, nats per image",
        caption="Evidence lower bound (ELBO) of the test images given their labels, in nats per image, and the two "
        "parts that it loses; pixels are normal around the decoded image. Error: mean square of what a pixel of the "
        "reconstruction is off.",
        heading="run",
        columns=[*map(Column, ("ELBO", "reconstruction", "KL", "error"))],
        lines=[
            Line(
                record.name,
                str(record.summary.get("objective", "not finished")),
                [number(record.summary.get("measured", {}).get(measure), form=".4g") for measure in measures],
            )
            for record in records
        ],
    )


def _details(anchor: str, record: RunRecord) -> Iterator[Drawn | None]:
    if record.kind == "robust.vae":
        yield draw(f"{anchor}-elbo", "Evidence lower bound", _elbo(record.rows),
                   "Of training batches and of held-out images, in nats per image.")  # fmt: skip


@matplotlib.rc_context(STYLE)
def _elbo(rows: pa.Table) -> Figure | None:
    figure, axes = canvas(HALF, 2.9, "epoch", "nats per image")
    batches, held_out = (curve(rows, split, "elbo").thinned() for split in ("train", "validation"))
    if len(batches):
        axes.plot(batches.epochs, batches.values, color=SPARE[1], lw=1.2, label="training batches")
    if len(held_out):
        axes.plot(held_out.epochs, held_out.values, color=INK, marker=".", markersize=5, label="held out")
    if not axes.lines:
        return None
    legend(axes)
    return figure


SECTION = Section("Data manifold", _grids, lambda records: (), _details)
