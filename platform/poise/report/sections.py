"""Runs grouped by the section of the page that shows their kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from poise.report.blocks import Column, Row, Section, Table, number
from poise.report.record import RunRecord
from poise.store.result import RunResult

__all__ = ["Sections", "grouped"]

Sections = Mapping[str, Section]
"""The section of each kind of run, by name of the kind. The registry of kinds provides them."""


_COMMON = set(RunResult.model_fields)
"""The fields that the results of all kinds have, which are no measurements."""

_IN_TERMINAL = 6
"""The number of columns that a terminal shows of the results of a kind without a section."""


def _number_tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    """A table of all numbers in the results of these runs, by their dotted paths."""
    values: dict[str, dict[str, float]] = {}
    for record in records:
        if record.result:
            values[record.name] = dict(_numbers(record.result.model_dump(exclude=_COMMON)))
    paths = list(dict.fromkeys(path for numbers in values.values() for path in numbers))
    if not paths:
        return
    rows = []
    for name, numbers in values.items():
        rows.append(Row(name, "", [number(numbers.get(path), form=".4g") for path in paths]))
    yield Table(
        title="Results",
        caption="All numbers of the results.",
        heading="run",
        columns=[Column(path, in_terminal=index < _IN_TERMINAL) for index, path in enumerate(paths)],
        rows=rows,
    )


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a dumped result, with its dotted path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


_UNKNOWN_KIND = Section("Runs", RunResult, _number_tables)
"""The section of a kind that has none of its own."""


def grouped(records: Sequence[RunRecord], sections: Sections) -> Iterator[tuple[Section, list[RunRecord]]]:
    """Records by the section that shows them, in the order in which each first appears."""
    groups: dict[str, tuple[Section, list[RunRecord]]] = {}
    for record in records:
        section = sections.get(record.kind, _UNKNOWN_KIND)
        groups.setdefault(section.title, (section, []))[1].append(record)
    yield from groups.values()
