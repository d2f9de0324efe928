"""Commands for jobs on a cluster: submit, status, logs, stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from poise.cli.options import (
    allow_code_option,
    dashboard_option,
    interrupt_note,
    load_spec,
    profile_option,
    refuse_code,
    refuse_errors,
    set_option,
    spec_argument,
)
from poise.observe.terminal import printable

__all__ = ["logs", "status", "stop", "submit"]


@click.command()
@spec_argument
@set_option
@profile_option
@allow_code_option
@dashboard_option
@click.option("--job", help="Id of the job; the default is poise-NAME.")
@click.option("--detach", is_flag=True, help="Return at once instead of following the log.")
def submit(
    spec: Path, assignments: Sequence[str], profile: str | None, address: str, job: str | None, detach: bool
) -> None:
    """Send a spec to a cluster as a job.

    Its log is followed until it ends; Ctrl-C leaves the job running. --allow-code holds for the job too.
    """
    from poise.engine.ray import jobs

    resolved, document = load_spec(spec, assignments, profile)
    refuse_code(resolved, document)
    refuse_errors(resolved, document, elsewhere=True)
    job_id = jobs.submit(resolved, address, job)
    click.echo(f"job {job_id} is on its way; poise status|logs|stop {job_id} --address {address}")
    if not detach:
        _follow(job_id, address)


@click.command()
@click.argument("job")
@dashboard_option
def status(job: str, address: str) -> None:
    """Print the state of a job."""
    from poise.engine.ray import jobs

    _print_job(jobs.status(job, address))


@click.command()
@click.argument("job")
@dashboard_option
@click.option("--follow", is_flag=True, help="Print until the job ends.")
def logs(job: str, address: str, follow: bool) -> None:
    """Print the output of a job."""
    from poise.engine.ray import jobs

    if follow:
        _follow(job, address)
    else:
        click.echo(jobs.logs(job, address), nl=False)


@click.command()
@click.argument("job")
@dashboard_option
def stop(job: str, address: str) -> None:
    """Stop a job. The commits of its run stay."""
    from poise.engine.ray import jobs

    _print_job(jobs.stop(job, address))


def _follow(job: str, address: str) -> None:
    """Print the output of a job until it ends, then its state; exits with its exit code unless it succeeded."""
    from poise.engine.ray import jobs

    def write(text: str) -> None:
        click.echo(text, nl=False)

    with interrupt_note(f"no longer followed; job {job} goes on"):
        details = jobs.follow(job, address, write)
        _print_job(details)
        if details.status.value != "SUCCEEDED":
            sys.exit(details.driver_exit_code or 1)


def _print_job(details: Any) -> None:
    """Print the state of a job, and Ray's message about it if there is one."""
    click.echo(f"{details.submission_id}: {details.status.value}")
    if details.message:
        click.echo(printable(details.message))
