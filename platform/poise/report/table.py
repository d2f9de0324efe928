"""The tables of the command line: results of several runs, the runs of a store, one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from poise.observe.terminal import printable
from poise.report.blocks import Cell, Table
from poise.report.record import RunRecord, when
from poise.report.sections import Sections, grouped
from poise.store.inputs import read_inputs
from poise.store.runs import Run, RunSummary

__all__ = ["comparison", "run_details", "run_list"]

_MAX_WIDTH = 1000


def comparison(records: Sequence[RunRecord], sections: Sections) -> Iterator[RichTable]:
    """The results of several runs, in the tables of their kinds."""
    for section, group in grouped(records, sections):
        for table in section.tables(group):
            if any(row.selected for row in table.rows):
                yield _to_rich(table)


def _to_rich(table: Table) -> RichTable:
    """The columns and rows of a table that a terminal shows."""
    rich_table = RichTable(
        title=Text(printable(table.title)),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    rows = [row for row in table.rows if row.selected]
    widest_head = max(len(row.head) for row in rows)
    rich_table.add_column(table.heading, overflow="fold", min_width=min(24, widest_head))
    in_terminal = [column.in_terminal for column in table.columns]
    for column in compress(table.columns, in_terminal):
        justify: Literal["left", "right"] = "left" if column.prose else "right"
        rich_table.add_column(column.label, justify=justify, no_wrap=not column.prose, overflow="fold")
    for row in rows:
        note = f"\n{printable(row.note)}" if row.note else ""
        head = Text.assemble((printable(row.head), "bold"), (note, "dim"))
        rich_table.add_row(head, *map(_cell, compress(row.cells, in_terminal)))
    return rich_table


def _cell(cell: Cell) -> Text:
    text = Text(printable(cell.text), style="bold")
    if cell.below:
        text.append(f"\n{printable(cell.below)}", style="not bold dim")
    return text


def print_whole(table: RichTable) -> None:
    """Print a table without breaking words, wider than the terminal if necessary, as `ls -l` does."""
    width = Console(width=_MAX_WIDTH).measure(table).maximum
    Console(width=width).print(table)


def run_list(runs: Sequence[RunSummary]) -> RichTable:
    """The runs of a store, one per line."""
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("run", "kind", "status"):
        table.add_column(heading, no_wrap=True)
    for heading in ("last commit", "best", "updated (UTC)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        # Text, because rich would read markup in a plain string.
        texts = [Text(printable(text)) for text in (run.name, run.kind, run.status)]
        steps = ["-" if step is None else f"{step:,}" for step in (run.last_checkpoint, run.best_step)]
        table.add_row(*texts, *steps, when(run.updated or None))
    return table


def run_inputs(run: Run) -> RichTable | None:
    """The recorded inputs of a run, one file per line; None where nothing is recorded."""
    records = read_inputs(run)
    if not records:
        return None
    table = RichTable(title="inputs", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("named by")
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("sha256 or ETag", no_wrap=True)
    for record in records.values():
        size = "" if record.bytes is None else f"{record.bytes:,}"
        name = record.file or f"run {record.place}"
        table.add_row(record.where, Text(printable(name)), size, (record.sha256 or record.etag or "")[:16])
    return table


def run_details(run: Run) -> Iterator[Text | RichTable]:
    """The state of one run, why it failed if it did, and its checkpoints, if it has any, oldest first."""
    summary = run.summary()
    manifest = None if summary.status == "damaged" else run.manifest()
    yield Text(printable(f"{run.url}: {summary.status}"))
    if manifest is not None and manifest.error:
        yield Text(printable(f"{manifest.status} because: {manifest.error}"))
    commits = run.checkpoints.commits()
    if not commits:
        return
    table = RichTable(box=box.SIMPLE_HEAD, show_edge=False)
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
