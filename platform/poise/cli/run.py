"""Commands for a spec: check it, run it, write its page, print the schemas."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from poise.cli.options import (
    allow_code_option,
    code_notes,
    interrupt_note,
    load_spec,
    metrics_sink,
    names_unwritable,
    open_named_run,
    print_results,
    profile_option,
    refuse_code,
    refuse_errors,
    set_option,
    spec_argument,
    warn_of_broken_plugins,
    warn_of_damages,
)
from poise.env import launched_rank

__all__ = ["check", "report", "run", "schema"]


@click.command()
@spec_argument
@set_option
@profile_option
@allow_code_option
@click.option("--spec-only", is_flag=True, help="Do not check the files, runs and functions that the spec names.")
def check(spec: Path, assignments: Sequence[str], profile: str | None, spec_only: bool) -> None:
    """Print a spec resolved, and its cost.

    A spec with mistakes is refused with all of them at once: file, line, key and what to write instead. The files, runs
    and functions that it names are checked too: whether they exist, and fit the spec. Without --allow-code, code of
    yours is read and not run: its options are not validated, which a note says.
    """
    from poise.spec import dump

    resolved, document = load_spec(spec, assignments, profile)
    if not spec_only:
        refuse_errors(resolved, document)
    code_notes(resolved, document)
    warn_of_broken_plugins()
    click.echo(dump(resolved), nl=False)
    click.echo()
    for line in resolved.cost():
        click.echo(f"# {line}")


@click.command()
@spec_argument
@set_option
@profile_option
@allow_code_option
@click.option(
    "--engine",
    type=click.Choice(["ray", "local"]),
    default="ray",
    show_default=True,
    help="ray: a group of workers.count processes. local: this process, or torchrun's, without Ray.",
)
@click.option(
    "--address", help="Join this Ray cluster, HOST:6379; the default is RAY_ADDRESS, or one for this command alone."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Serve Prometheus metrics of this process; 0 picks a port.",
)
def run(
    spec: Path,
    assignments: Sequence[str],
    profile: str | None,
    engine: Any,
    address: str | None,
    metrics_port: int | None,
) -> None:
    """Run a spec, and print its results.

    A run that was stopped or killed goes on from its last commit. The results of a finished run are only printed.
    """
    from poise.engine.launch import launch, stages_of
    from poise.engine.lifecycle import is_finished, located
    from poise.observe.progress import Display

    resolved, document = load_spec(spec, assignments, profile)
    refuse_code(resolved, document)
    stages = stages_of(resolved)
    finished = {stage.name for stage in stages if is_finished(located(stage), stage)}
    joins = engine == "ray" and (address is not None or "RAY_ADDRESS" in os.environ)
    refuse_errors(resolved, document, skip=finished, elsewhere=joins)
    with interrupt_note("stopped; the same command goes on from the last commit"):
        with (
            Display(runs=[stage.name for stage in stages]) as display,
            metrics_sink(metrics_port, display.note) as sink,
        ):
            launch(resolved, engine, address, display, sink)
        if launched_rank()[0] == 0:
            print_results(resolved, stages)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write; the default is report.html in the first run.",
)
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Write TensorBoard files into this folder too.")
def report(runs: Sequence[str], output: Path | None, tensorboard: Path | None) -> None:
    """Write a page about one or several runs.

    RUN is store/name, such as runs/quickstart-adt or s3://bucket/prefix/name; a name alone is in the folder runs.
    """
    from poise.kinds import report_sections, result_classes
    from poise.report.publish import publish
    from poise.report.record import load_record

    opened_runs = [open_named_run(name) for name in runs]
    records = [load_record(each, result_classes()) for each in opened_runs]
    warn_of_damages(records)
    if tensorboard is not None:
        from poise.observe.tensorboard import write_tensorboard

        for record in records:
            write_tensorboard(record.rows, tensorboard / record.name)
    with names_unwritable(output):
        click.echo(publish(records, opened_runs[0], report_sections(), output))


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for one file per kind; the default prints them."
)
def schema(output: Path | None) -> None:
    """Write the JSON Schemas of specs."""
    from poise.kinds import KINDS
    from poise.spec import json_schema

    for kind, spec_class in KINDS.items():
        text = json.dumps(json_schema(spec_class, kind), indent=2)
        if output is None:
            click.echo(text)
            continue
        with names_unwritable(output):
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{kind}.schema.json").write_text(text + "\n")
        click.echo(output / f"{kind}.schema.json")
