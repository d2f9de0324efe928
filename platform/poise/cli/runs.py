"""Commands for a store: list, show, verify, clean and remove runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from poise.cli.options import open_named_run, warn_of_damages
from poise.errors import PoiseError, UserError

if TYPE_CHECKING:
    from poise.store.runs import Run

__all__ = ["runs", "runs_gc", "runs_list", "runs_rm", "runs_show", "runs_verify"]


@click.group()
def runs() -> None:
    """Look at, verify and clean a store of runs."""


@runs.command("list")
@click.argument("store", default="runs")
def runs_list(store: str) -> None:
    """List the runs of a store: a folder, or s3://bucket/prefix. The default is the folder runs."""
    from poise.report.table import print_whole, run_list
    from poise.store.runs import list_runs
    from poise.store.storage import open_storage

    storage = open_storage(store)
    if "://" not in store and not Path(storage.url).is_dir():
        raise UserError(f"there is no folder {storage.url}: name the store, as in `poise runs list FOLDER`")
    summaries = list_runs(storage)
    if summaries:
        print_whole(run_list(summaries))
    else:
        click.echo(f"{storage.url} holds no run")


@runs.command("show")
@click.argument("run")
def runs_show(run: str) -> None:
    """Print the state of a run, its checkpoints, its inputs and its results."""
    from rich.console import Console

    from poise.kinds import report_sections, result_classes
    from poise.report.record import load_record
    from poise.report.table import comparison, run_details, run_inputs

    opened = open_named_run(run)
    record = load_record(opened, result_classes())
    warn_of_damages([record])
    inputs = run_inputs(opened)
    parts = [*run_details(opened)]
    if inputs:
        parts.append(inputs)
    parts += comparison([record], report_sections())
    console = Console()
    for part in parts:
        console.print(part)


@runs.command("verify")
@click.argument("run")
def runs_verify(run: str) -> None:
    """Compare every byte with its sha256.

    Reads all that the run has committed. The exit code is 1 if anything is damaged.
    """
    opened = open_named_run(run)
    corruptions = opened.verify()
    for damage in corruptions:
        click.echo(str(damage))
    if corruptions:
        raise PoiseError(f"{len(corruptions)} damaged; the run goes on from its newest valid checkpoint")
    click.echo(f"{run}: {len(opened.checkpoints.commits())} checkpoints and all artifacts are valid")


@runs.command("gc")
@click.argument("run")
@click.option(
    "--older-than",
    type=click.FloatRange(0),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Keep files that are younger: they may be in use.",
)
def runs_gc(run: str, older_than: float) -> None:
    """Remove incomplete uploads and damaged checkpoints.

    Incomplete uploads are those of processes that died. Committed files stay.
    """
    opened = open_named_run(run)
    with opened.lease():  # so that no other process writes meanwhile
        removed = [*opened.checkpoints.sweep(older_than), *opened.storage.sweep(older_than, f"{opened.name}/")]
    for name in removed:
        click.echo(f"removed {name}")
    click.echo(f"{len(removed)} orphans removed")


@runs.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def runs_rm(names: Sequence[str], yes: bool) -> None:
    """Remove runs with all that they have committed. This cannot be undone.

    A run that a process is running now is refused.
    """
    opened_runs = [open_named_run(name) for name in names]
    for count, run in enumerate(opened_runs):
        if not yes and not _confirm(run):
            raise PoiseError("nothing more was removed" if count else "nothing was removed")
        run.remove()
        click.echo(f"removed {run.url}")


def _confirm(run: Run) -> bool:
    """Ask whether to remove the run; False if the answer is no, or if the input has ended."""
    commits = len(run.checkpoints.commits())
    try:
        return click.confirm(f"remove {run.url}, {run.summary().status}, with {commits} checkpoints?")
    except click.Abort:
        click.echo(err=True)  # end the line of the question
        return False
