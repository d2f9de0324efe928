"""Tables of attacks on the data manifold: success on it, off it and in the full ball."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from poise.kinds.robust_manifold.result import ClassifierResult, RobustManifoldResult
from poise.report.blocks import Cell, Column, Row, Section, Table, percent
from poise.report.curves import label
from poise.report.record import RunRecord, with_result

__all__ = ["SECTION"]

_WHERE = {"on_manifold": "on", "off_manifold": "off", "full": "full ball"}
"""The label of each set of perturbations."""
_DASH = "\u2013"


def _tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    attacked: list[tuple[RunRecord, ClassifierResult]] = []
    for record, result in with_result(records, RobustManifoldResult):
        attacked += [(record, classifier) for classifier in result.classifiers]
    if attacked:
        yield _success(attacked)
    if any(classifier.latent for _, classifier in attacked):
        yield _codes(attacked)


def _success(attacked: Sequence[tuple[RunRecord, ClassifierResult]]) -> Table:
    return Table(
        title="Success of attacks on and off the data manifold, percent",
        caption="Success: share, in percent, of the correctly classified images that an attack in the ball fools. "
        "On: within the eigenspace of the image's class; off: orthogonal to it; full ball: without restriction. Left: "
        "the part of the length of the perturbations that lies outside of their subspace, because pixels are clipped "
        "to the box; for the full ball, the part that lies off the manifold.",
        heading="network, ball",
        columns=[
            Column("clean"),
            *map(Column, _WHERE.values()),
            *(Column(f"{name} left", in_terminal=False) for name in _WHERE.values()),
        ],
        rows=[_row(record, network, norm) for record, network in attacked for norm in network.attacks],
    )


def _row(record: RunRecord, network: ClassifierResult, norm: str) -> Row:
    dimensions = network.dimensions
    on_manifold = f"{dimensions['on_manifold']} of {dimensions['full']} dimensions"
    note = f"{network.attacks[norm].words}; {on_manifold}, in {record.name}"
    cells = [percent(network.clean, network.num_examples)]
    cells += [_share(network.success[f"{where}/{norm}"]) for where in _WHERE]
    cells += [_share(network.residual[f"{where}/{norm}"].share) for where in _WHERE]
    return Row(f"{network.run}, {label(norm)}", note, cells)


def _share(value: float | None) -> Cell:
    return Cell(_DASH) if value is None else percent(value)


def _codes(attacked: Sequence[tuple[RunRecord, ClassifierResult]]) -> Table:
    return Table(
        title="Attacks on the codes of an autoencoder, percent",
        caption="Accuracy in percent on the reconstructions of the images, and on what their attacked codes decode to. "
        "Success counts only images whose reconstruction is classified correctly.",
        heading="network",
        columns=[*map(Column, ("images", "reconstructions", "attacked codes", "success"))],
        rows=[_codes_row(record, network) for record, network in attacked if network.latent],
    )


def _codes_row(record: RunRecord, network: ClassifierResult) -> Row:
    latent = network.latent
    assert latent is not None  # the caller leaves out the others
    accuracies = [network.clean, latent.reconstruction, latent.accuracy]
    cells = [Cell(_DASH) if value is None else percent(value, network.num_examples) for value in accuracies]
    words = record.result.latent if isinstance(record.result, RobustManifoldResult) else None
    return Row(network.run, words or "", [*cells, _share(latent.success)])


SECTION = Section("Data manifold", RobustManifoldResult, tables=_tables)
