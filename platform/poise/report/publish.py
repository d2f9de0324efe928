"""Put a page where its reader finds it: beside the runs that it is about, or in a file of their choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from poise.report.page import load_record, render
from poise.store.runs import Run

__all__ = ["publish"]

_NAMES_IN_TITLE = 3
_PAGE = "report.html"


def publish(runs: Sequence[Run], home: Run, output: Path | None = None) -> str:
    """Write the page of `runs` into run `home`, or to the file `output`, and return where it is."""
    page = render([load_record(run) for run in runs], title=_title(runs, home)).encode()
    if output is None:
        home.write(_PAGE, page)
        here, place = f"{Path.cwd()}/", f"{home.url}/{_PAGE}"
        return place.removeprefix(here)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(page)
    return str(output)


def _title(runs: Sequence[Run], home: Run) -> str:
    """The name of the run or pipeline that the page belongs to; of runs set side by side, their names."""
    names = [run.name for run in runs]
    if len(names) == 1 or home.name not in names:
        return home.name
    if len(names) <= _NAMES_IN_TITLE + 1:
        return f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{', '.join(names[:_NAMES_IN_TITLE])} and {len(names) - _NAMES_IN_TITLE} more runs"
