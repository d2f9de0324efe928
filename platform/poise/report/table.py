"""The tables that the command line prints: results of several runs, the runs of a store, one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poise.observe.terminal import printable
from poise.report.blocks import Cell, Grid
from poise.report.record import RunRecord, when
from poise.report.sections import grouped
from poise.store.inputs import read_inputs
from poise.store.runs import Run, RunSummary

__all__ = ["comparison", "run_details", "run_list"]

_WIDEST = 1000


def comparison(records: Sequence[RunRecord]) -> Iterator[Table]:
    """The results of runs beside each other, a table per grid of their kinds."""
    for section, group in grouped(records):
        for grid in section.grids(group):
            if any(line.selected for line in grid.lines):
                yield _table(grid)


def _table(grid: Grid) -> Table:
    table = Table(
        title=Text(printable(grid.title)),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    lines = [line for line in grid.lines if line.selected]
    table.add_column(grid.heading, overflow="fold", min_width=min(24, max(len(line.head) for line in lines)))
    brief = [column.brief for column in grid.columns]
    for column in compress(grid.columns, brief):
        justify: Literal["left", "right"] = "left" if column.prose else "right"
        table.add_column(column.label, justify=justify, no_wrap=not column.prose, overflow="fold")
    for line in lines:
        head = Text.assemble((printable(line.head), "bold"), (f"\n{printable(line.note)}" if line.note else "", "dim"))
        table.add_row(head, *map(_cell, compress(line.cells, brief)))
    return table


def _cell(cell: Cell) -> Text:
    text = Text(printable(cell.text), style="bold")
    if cell.below:
        text.append(f"\n{printable(cell.below)}", style="not bold dim")
    return text


def print_whole(table: Table) -> None:
    """Print a table with every word in one piece, wider than the terminal if need be, as `ls -l` does."""
    width = Console(width=_WIDEST).measure(table).maximum
    Console(width=width).print(table)


def run_list(runs: Sequence[RunSummary]) -> Table:
    """The runs of a store, one a line."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("run", "kind", "status"):
        table.add_column(heading, no_wrap=True)
    for heading in ("last commit", "best", "updated (UTC)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        steps = ("-" if step is None else f"{step:,}" for step in (run.last_checkpoint, run.best_step))
        words = (Text(printable(word)) for word in (run.name, run.kind, run.status))  # no markup of rich
        table.add_row(*words, *steps, when(run.updated or None))
    return table


def run_inputs(run: Run) -> Table | None:
    """What a run has read besides its spec, a file a line; None where nothing is recorded."""
    records = read_inputs(run)
    if not records:
        return None
    table = Table(title="inputs", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("named by")
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("sha256 or ETag", no_wrap=True)
    for record in records.values():
        size = "" if record.bytes is None else f"{record.bytes:,}"
        name = record.file or f"run {record.place}"
        table.add_row(record.where, Text(printable(name)), size, (record.sha256 or record.etag or "")[:16])
    return table


def run_details(run: Run) -> Iterator[Text | Table]:
    """The state of one run, why it failed if it did, and its checkpoints, if it has any, oldest first."""
    summary = run.summary()
    known = None if summary.status == "damaged" else run.manifest()
    yield Text(printable(f"{run.url}: {summary.status}"))
    if known is not None and known.error:
        yield Text(printable(f"{known.status} because: {known.error}"))
    commits = run.checkpoints.commits()
    if not commits:
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("checkpoint", "step", "MiB", "committed (UTC)"):
        table.add_column(heading, justify="right" if heading in ("step", "MiB") else "left")
    for commit in commits:
        best = " (best)" if commit.step == summary.best_step else ""
        table.add_row(
            Text(printable(commit.name) + best),
            f"{commit.step:,}",
            f"{commit.size / 2**20:.2f}",
            when(commit.committed),
        )
    yield table
