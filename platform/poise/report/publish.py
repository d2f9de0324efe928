"""Write the page of runs into the store, or into a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from poise.report.page import render
from poise.report.record import RunRecord
from poise.report.sections import Sections
from poise.store.runs import Run

__all__ = ["publish"]

_NAMES_IN_TITLE = 3
_PAGE = "report.html"


def publish(records: Sequence[RunRecord], home: Run, sections: Sections, output: Path | None = None) -> str:
    """Write the page of `records` into run `home`, or to the file `output`; the path or URL of the page."""
    page = render(records, title=_title([record.name for record in records], home), sections=sections).encode()
    if output is None:
        home.write(_PAGE, page)
        current_folder = f"{Path.cwd()}/"
        return f"{home.url}/{_PAGE}".removeprefix(current_folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(page)
    return str(output)


def _title(names: Sequence[str], home: Run) -> str:
    """The name of the run or pipeline `home`; for a comparison of several runs, their names."""
    if len(names) == 1 or home.name not in names:
        return home.name
    if len(names) <= _NAMES_IN_TITLE + 1:
        return f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{', '.join(names[:_NAMES_IN_TITLE])} and {len(names) - _NAMES_IN_TITLE} more runs"
