"""The command line, assembled from its groups."""

from __future__ import annotations

import signal
import sys

import click

from poise import __version__
from poise.cli.cluster import cluster_group
from poise.cli.extras import missing_extra
from poise.cli.jobs import logs, status, stop, submit
from poise.cli.options import InterruptNoteError, warn_of_broken_plugins
from poise.cli.run import check, report, run, schema
from poise.cli.runs import runs
from poise.errors import PoiseError, PreemptedError
from poise.observe.terminal import printable

__all__ = ["cli", "main"]


class _InOrder(click.Group):
    """Lists commands in the order in which they were added, which is that of a first use."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


def _print_versions(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from poise.observe.environment import package_versions

    click.echo(f"poise, version {__version__}")
    for name, version in package_versions().items():
        click.echo(f"{name} {version}")
    warn_of_broken_plugins()
    context.exit()


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: poise run jobs/quickstart.yaml. More: poise COMMAND --help, and the guides in docs/.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Show the version, those of the packages that numbers depend on, and exit.",
)
def cli() -> None:
    """Train and measure models that keep their balance: robust under attack, and honest about it."""


for _command in (check, run, submit, status, logs, stop, report, schema, runs, cluster_group):
    cli.add_command(_command)


def main() -> None:
    """Run the command line: a PoiseError is printed without a traceback and sets the exit code."""
    # Ray and Kubernetes end jobs with SIGTERM: as an interrupt it releases the lease of the run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cli(standalone_mode=False)
    except PoiseError as error:
        text = printable(str(error))
        separator = "\n" if "\n" in text else " "
        click.echo(f"poise:{separator}{text}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        click.echo(f"poise: {missing}", err=True)
        sys.exit(missing.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the cleanup at exit
        cause = error.__cause__  # click raises Abort from every interrupt
        if isinstance(cause, PreemptedError):
            click.echo(f"poise: {cause}", err=True)
            sys.exit(cause.exit_code)
        note = cause if isinstance(cause, InterruptNoteError) else "stopped"
        click.echo(f"poise: {note}", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
