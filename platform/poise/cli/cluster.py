"""Commands for a Ray cluster on this machine: start it, end it, show it, and make its token."""

from __future__ import annotations

from pathlib import Path

import click

from poise.errors import UserError

__all__ = ["cluster_down", "cluster_group", "cluster_status", "cluster_token", "cluster_up"]


@click.group("cluster")
def cluster_group() -> None:
    """A Ray cluster on this machine, for several runs and jobs."""


_folder = click.option(
    "--folder", type=click.Path(path_type=Path), help="Folder of its record; the default is ~/.poise/MACHINE."
)
_port = click.IntRange(1, 65535)


@cluster_group.command("up")
@_folder
@click.option("--port", type=_port, default=6379, show_default=True, help="Port that drivers join.")
@click.option("--dashboard-port", type=_port, default=8265, show_default=True, help="Port that jobs are sent to.")
@click.option("--cpus", type=click.IntRange(1), help="CPU cores to offer; the default is all of the machine.")
@click.option("--gpus", type=click.IntRange(0), help="GPUs to offer; the default is all of the machine.")
def cluster_up(folder: Path | None, port: int, dashboard_port: int, cpus: int | None, gpus: int | None) -> None:
    """Start the cluster, unless it is up, and print the commands that use it."""
    from poise.engine.ray import cluster

    folder = folder or cluster.default_folder()
    existing = cluster.find(folder)
    up = existing or cluster.up(folder, port, dashboard_port, cpus, gpus)
    click.echo(f"{'already up' if existing else 'up'}: {up.address}, dashboard {up.dashboard}")
    click.echo(f"poise run SPEC --address {up.address}\npoise submit SPEC --address {up.dashboard}")


@cluster_group.command("down")
@_folder
def cluster_down(folder: Path | None) -> None:
    """End the cluster with all that runs on it. Other clusters go on."""
    from poise.engine.ray import cluster

    click.echo("down" if cluster.down(folder or cluster.default_folder()) else "nothing was up")


@cluster_group.command("status")
@_folder
def cluster_status(folder: Path | None) -> None:
    """Print the addresses of the cluster, its machines and its jobs."""
    from poise.engine.ray import cluster

    existing = cluster.find(folder or cluster.default_folder())
    if existing is None:
        raise UserError("no cluster is up here; start one with: poise cluster up")
    status = cluster.status(existing)
    click.echo(f"up: {existing.address}, dashboard {existing.dashboard}\nmetrics: {existing.endpoints}")
    for node in status.nodes:
        resources = ", ".join(f"{amount:g} {name}" for name, amount in node.resources.items())
        click.echo(f"machine {node.ip}: {resources}")
    for job in status.jobs:
        click.echo(f"job {job.submission_id}: {job.status.value}")


@cluster_group.command("token")
def cluster_token() -> None:
    """Make Ray's token unless there is one, and print the path of its file.

    Call this before `ray start`: without a token it starts a cluster without authentication, on which anybody who
    reaches it may run code.
    """
    from poise.engine.ray.auth import ensure_token, token_file

    ensure_token()
    click.echo(token_file())
