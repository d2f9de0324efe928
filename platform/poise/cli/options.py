"""Arguments and functions that several commands share: opening a spec or a run, messages, printed results."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poise.env import launched_rank
from poise.errors import PreemptedError, UserError
from poise.observe.terminal import printable

if TYPE_CHECKING:
    from poise.observe.sinks import Sink
    from poise.report.record import RunRecord
    from poise.spec import RunSpec
    from poise.spec.problems import Path as SpecPath
    from poise.spec.reader import Document
    from poise.store.runs import Run

__all__ = [
    "InterruptNoteError",
    "allow_code_option",
    "code_notes",
    "dashboard_option",
    "interrupt_note",
    "load_spec",
    "metrics_sink",
    "names_unwritable",
    "open_named_run",
    "print_results",
    "profile_option",
    "refuse_code",
    "refuse_errors",
    "set_option",
    "spec_argument",
    "warn_of_broken_plugins",
    "warn_of_damages",
]


class InterruptNoteError(KeyboardInterrupt):
    """An interrupt with a message about what continues after it."""


@contextmanager
def interrupt_note(message: str) -> Iterator[None]:
    """Give an interrupt of the block a message about what continues; a PreemptedError keeps its own."""
    try:
        yield
    except PreemptedError:
        raise
    except KeyboardInterrupt:
        raise InterruptNoteError(message) from None


spec_argument = click.argument("spec", type=click.Path(path_type=Path))
set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a value, such as train.epochs=5; the value is YAML. May be repeated.",
)
profile_option = click.option(
    "--profile", metavar="NAME", help="Apply the changes under `profiles` NAME of the spec, as a run with its own name."
)


def _allow_code(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Allow code of the user until the command ends."""
    if value:
        from poise.user_code import allow_code

        context.with_resource(allow_code())


allow_code_option = click.option(
    "--allow-code",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_allow_code,
    help="Run code of yours that the spec names as package.module:attribute; also POISE_ALLOW_CODE=1.",
)
dashboard_option = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    default="http://127.0.0.1:8265",
    show_default=True,
    show_envvar=True,
    help="Address of the Ray dashboard.",
)


@contextmanager
def names_unwritable(output: Path | None) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names the path of `--output`."""
    try:
        yield
    except OSError as error:
        if output is None or isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{output} cannot be written: {error.strerror}; name another place with --output") from None


def load_spec(spec: Path, assignments: Sequence[str], profile: str | None) -> tuple[RunSpec, Document]:
    """The resolved spec of a file with `--set` and `--profile`, and its document, which has the line of each field."""
    from poise.kinds import KINDS
    from poise.spec import load_document

    return load_document(spec, KINDS, assignments, profile)


def refuse_code(spec: RunSpec, document: Document) -> None:
    """Raise SpecError if the spec needs code of the user and that is not allowed. Called before anything is started."""
    from poise.spec import SpecError

    if messages := _code_messages(spec):
        raise SpecError([document.problem(path, message) for path, message in messages])


def code_notes(spec: RunSpec, document: Document) -> None:
    """Print a note on stderr for all code of the user that the spec needs, unless it is allowed."""
    for path, message in _code_messages(spec):
        if path[-1] == "name":  # a class, which would validate the options beside its name
            message = f"{message}; its options were not validated"
        click.echo(f"poise: {printable(str(document.problem(path, message)))}", err=True)


def _code_messages(spec: RunSpec) -> list[tuple[SpecPath, str]]:
    """Path and message of all code of the user that the spec needs; [] where code is allowed."""
    from poise.kinds.code import named_code
    from poise.user_code import is_code_allowed, refusal

    if is_code_allowed():
        return []
    messages = []
    for code in named_code(spec):
        what = refusal(code.reference)
        messages.append((code.path, what if code.run is None else f"run {code.run!r} needs it: {what}"))
    return list(dict.fromkeys(messages))


def refuse_errors(spec: RunSpec, document: Document, *, skip: Collection[str] = (), elsewhere: bool = False) -> None:
    """Raise SpecError with every reason why the spec cannot run, and print its notes on stderr.

    Called before anything is started or claimed. `elsewhere`: the spec runs on a cluster, which may have files that are
    absent on this machine. `skip` are the names of runs that are not checked.
    """
    from poise.kinds.check import find_errors
    from poise.spec import SpecError

    findings = [each for each in find_errors(spec, skip=skip) if not (elsewhere and each.absent)]
    if errors := [each for each in findings if not each.is_note]:
        problems = [document.problem(each.path, each.message) for each in errors]
        raise SpecError(list(dict.fromkeys(problems)))
    if launched_rank()[0] == 0:
        for note in findings:
            click.echo(f"poise: {printable(str(document.problem(note.path, note.message)))}", err=True)


def open_named_run(name: str) -> Run:
    """The run at `store/name`; a name without a store is in the folder `runs`. UserError if there is none."""
    from poise.store.runs import open_run

    store, slash, last = name.rstrip("/").rpartition("/")
    return open_run(store if slash else "runs", last, must_exist=True)


@contextmanager
def metrics_sink(port: int | None, note: Any) -> Iterator[Sink]:
    """Yield the sink of this process, served at `port`; at the end waits for a scrape of how the run ended.

    Of the processes of torchrun only rank 0 serves metrics, since they would all use the same port.
    """
    from poise.observe.sinks import NullSink

    if port is None or launched_rank()[0] != 0:
        yield NullSink()
        return
    from poise.observe.prometheus import PrometheusSink

    sink = PrometheusSink()
    note(f"metrics are served on port {sink.serve(port)}, path /metrics")
    try:
        yield sink
    except Exception:
        sink.wait_for_scrape()
        raise
    sink.wait_for_scrape()


def print_results(spec: RunSpec, stages: Sequence[RunSpec]) -> None:
    """Print the tables of the stages, write the page of `spec`, and print its path."""
    from rich.console import Console

    from poise.kinds import report_sections, result_classes
    from poise.report.publish import publish
    from poise.report.record import load_record
    from poise.report.table import comparison
    from poise.store.runs import open_run

    records = [load_record(open_run(stage.store, stage.name), result_classes()) for stage in stages]
    warn_of_damages(records)
    for table in comparison(records, report_sections()):
        Console().print(table, "")
    click.echo(f"page: {publish(records, open_run(spec.store, spec.name), report_sections())}")


def warn_of_damages(records: Sequence[RunRecord]) -> None:
    """Print on stderr every missing or damaged file of these runs, whose content is not shown."""
    for record in records:
        for damage in record.corruptions:
            click.echo(printable(f"poise: warning: {damage}"), err=True)


def warn_of_broken_plugins() -> None:
    """Print on stderr every entry point of an installed package that cannot be loaded, or whose kind is broken."""
    from poise import plugins

    warnings = list(plugins.failures())
    if plugins.names("poise.kinds"):  # the registry of kinds takes time to import
        from poise.kinds.registry import failures

        warnings += failures()
    for warning in warnings:
        click.echo(printable(f"poise: warning: {warning}"), err=True)
