"""Which section of a page shows which kind of run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from poise.report import align, bounds, calibrate, evaluation, language, manifold, robust, sweep
from poise.report.blocks import Section
from poise.report.record import RunRecord

__all__ = ["SECTIONS", "grouped"]

_NOTHING = Section("Runs", lambda records: (), lambda records: (), lambda anchor, record: ())

SECTIONS: Mapping[str, Section] = {
    "robust.train": robust.SECTION,
    "robust.evaluate": evaluation.SECTION,
    "robust.vae": manifold.SECTION,
    "robust.manifold": manifold.SECTION,
    "bounds.report": bounds.SECTION,
    "finetune.sft": language.SECTION,
    "align.selfplay": align.SECTION,
    "calibrate.measure": calibrate.SECTION,
    "sweep": sweep.SECTION,
}


def grouped(records: Sequence[RunRecord]) -> Iterator[tuple[Section, list[RunRecord]]]:
    """Records by the section that shows them, in the order in which each first appears."""
    groups: dict[str, tuple[Section, list[RunRecord]]] = {}
    for record in records:
        section = SECTIONS.get(record.kind, _NOTHING)
        groups.setdefault(section.title, (section, []))[1].append(record)
    yield from groups.values()
