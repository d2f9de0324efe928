"""Runs grouped by the section of the page that shows their kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from poise.report.blocks import Section, Table
from poise.report.record import RunRecord
from poise.store.result import RunResult

__all__ = ["Sections", "grouped"]

Sections = Mapping[str, Section]
"""The section of each kind of run, by name of the kind. The registry of kinds provides them."""


def _no_tables(records: Sequence[RunRecord]) -> Sequence[Table]:
    return ()


_UNKNOWN_KIND = Section("Runs", RunResult, _no_tables)


def grouped(records: Sequence[RunRecord], sections: Sections) -> Iterator[tuple[Section, list[RunRecord]]]:
    """Records by the section that shows them, in the order in which each first appears."""
    groups: dict[str, tuple[Section, list[RunRecord]]] = {}
    for record in records:
        section = sections.get(record.kind, _UNKNOWN_KIND)
        groups.setdefault(section.title, (section, []))[1].append(record)
    yield from groups.values()
