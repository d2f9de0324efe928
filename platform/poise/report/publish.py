"""Put a page where its reader finds it: beside the runs that it is about, or in a file of their choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from poise.report.page import render
from poise.report.record import RunRecord
from poise.store.runs import Run

__all__ = ["publish"]

_NAMES_IN_TITLE = 3
_PAGE = "report.html"


def publish(records: Sequence[RunRecord], home: Run, output: Path | None = None) -> str:
    """Write the page of `records` into run `home`, or to the file `output`, and return where it is."""
    page = render(records, title=_title([record.name for record in records], home)).encode()
    if output is None:
        home.write(_PAGE, page)
        here, place = f"{Path.cwd()}/", f"{home.url}/{_PAGE}"
        return place.removeprefix(here)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(page)
    return str(output)


def _title(names: Sequence[str], home: Run) -> str:
    """The name of the run or pipeline that the page belongs to; of runs set side by side, their names."""
    if len(names) == 1 or home.name not in names:
        return home.name
    if len(names) <= _NAMES_IN_TITLE + 1:
        return f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{', '.join(names[:_NAMES_IN_TITLE])} and {len(names) - _NAMES_IN_TITLE} more runs"
