"""The tables that the command line prints: results of several runs, the runs of a store, one run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from poise.report.curves import label, ordered, wilson
from poise.report.record import RunRecord, when
from poise.store.runs import Run, RunSummary

__all__ = ["comparison", "run_details", "run_list"]


def comparison(records: Sequence[RunRecord]) -> Table:
    """Test accuracy of the selected checkpoint of each run in percent, above its 95% Wilson interval."""
    measures = ordered(measure for record in records for measure in record.accuracy())
    table = Table(
        title="Test accuracy in percent, 95% intervals", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
    )  # fmt: skip
    table.add_column("run", overflow="fold")
    for measure in measures:
        table.add_column(label(measure), justify="right", no_wrap=True)
    for record in records:
        accuracy = record.accuracy()
        table.add_row(_head(record), *(_cell(accuracy.get(m, math.nan), record.examples) for m in measures))
    return table


def _head(record: RunRecord) -> Text:
    checkpoint = next(iter(record.checkpoints), "not evaluated")
    images = f", n={record.examples:,}" if record.examples else ""
    return Text.assemble((record.name, "bold"), (f"\n{checkpoint}{images}", "dim"))


def _cell(value: float, examples: int) -> Text:
    if not math.isfinite(value):
        return Text("-", style="dim")
    cell = Text(f"{100 * value:.1f}", style="bold")
    if examples > 0:
        low, high = wilson(value, examples)
        cell.append(f"\n{100 * low:.1f}\u2013{100 * high:.1f}", style="not bold dim")
    return cell


def run_list(runs: Sequence[RunSummary]) -> Table:
    """The runs of a store, one a line."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("run", "kind", "status"):
        table.add_column(heading, overflow="fold")
    for heading in ("last commit", "best", "updated (UTC)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        steps = ("-" if step is None else f"{step:,}" for step in (run.last_checkpoint, run.best_step))
        table.add_row(run.name, run.kind, run.status, *steps, when(run.updated or None))
    return table


def run_details(run: Run) -> Table:
    """The state of one run and its checkpoints, oldest first."""
    summary = run.summary()
    known = None if summary.status == "damaged" else run.manifest()
    table = Table(title=f"{run.url}: {summary.status}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("checkpoint", "step", "MiB", "committed (UTC)"):
        table.add_column(heading, justify="right" if heading in ("step", "MiB") else "left")
    for commit in run.checkpoints.commits():
        best = " (best)" if commit.step == summary.best_step else ""
        table.add_row(commit.name + best, f"{commit.step:,}", f"{commit.size / 2**20:.2f}", when(commit.committed))
    if known is not None and known.error:
        table.caption = Text(known.error)
    return table
