"""The command line: it reads arguments, calls the room that does the work, and prints. Nothing else happens here."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poise import __version__
from poise.env import launched_rank
from poise.errors import PoiseError, PreemptedError, UserError
from poise.observe.terminal import printable

if TYPE_CHECKING:
    from poise.observe.sinks import Sink
    from poise.report.record import RunRecord
    from poise.spec import RunSpec
    from poise.spec.reader import Document
    from poise.store.runs import Run

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line: a PoiseError is printed without a traceback and sets the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends a job or a pod lets go of the run, too
    try:
        cli(standalone_mode=False)
    except PoiseError as error:
        text = printable(str(error))
        click.echo(f"poise:{chr(10) if chr(10) in text else ' '}{text}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what tidies up when Python exits is not cut off by a second one
        if isinstance(error.__cause__, PreemptedError):  # click makes an Abort of every interrupt
            click.echo(f"poise: {error.__cause__}", err=True)
            sys.exit(error.__cause__.exit_code)
        click.echo(f"poise: {error.__cause__ if isinstance(error.__cause__, _LeftError) else 'stopped'}", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


class _LeftError(KeyboardInterrupt):
    """An interrupt after which something goes on, as its message says."""


@contextmanager
def _goes_on(message: str) -> Iterator[None]:
    """Say what goes on after an interrupt; one that has its own message keeps it."""
    try:
        yield
    except PreemptedError:
        raise
    except KeyboardInterrupt:
        raise _LeftError(message) from None


class _InOrder(click.Group):
    """Commands are listed in the order in which a newcomer meets them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: poise run jobs/quickstart.yaml. More: poise COMMAND --help, and the guides in docs/.",
)
@click.version_option(__version__, prog_name="poise")
def cli() -> None:
    """Train and measure models that keep their balance: robust under attack, and honest about it."""


_spec = click.argument("spec", type=click.Path(path_type=Path))
_set = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a value, such as train.epochs=5; the value is YAML. May be repeated.",
)
_profile = click.option(
    "--profile", metavar="NAME", help="Apply the changes that the spec has under `profiles`; the run is NAME's own."
)
_address = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    default="http://127.0.0.1:8265",
    show_default=True,
    show_envvar=True,
    help="Address of the Ray dashboard.",
)


@cli.command()
@_spec
@_set
@_profile
@click.option("--spec-only", is_flag=True, help="Do not look at the files, runs and functions that the spec names.")
def check(spec: Path, assignments: Sequence[str], profile: str | None, spec_only: bool) -> None:
    """Print a spec resolved, and its cost.

    A spec with mistakes is refused with all of them at once: file, line, key and what to write instead. What it names
    is looked at too: whether files, runs and functions are there, and are what they have to be.
    """
    from poise.spec import dump

    resolved, document = _load(spec, assignments, profile)
    if not spec_only:
        _refuse_mistakes(resolved, document)
    click.echo(dump(resolved), nl=False)
    click.echo()
    for line in resolved.cost():
        click.echo(f"# {line}")


@cli.command()
@_spec
@_set
@_profile
@click.option(
    "--engine",
    type=click.Choice(["ray", "local"]),
    default="ray",
    show_default=True,
    help="ray: a gang of workers.count processes. local: this process, or torchrun's, without Ray.",
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
    """Run a spec, and print what came out.

    A run that was stopped or killed goes on from its last commit; one that is finished is only shown.
    """
    from poise.engine.drive import drive, stages_of
    from poise.engine.session import is_finished, located
    from poise.observe.progress import Display

    resolved, document = _load(spec, assignments, profile)
    stages = stages_of(resolved)
    finished = {stage.name for stage in stages if is_finished(located(stage), stage)}
    joins = engine == "ray" and (address is not None or "RAY_ADDRESS" in os.environ)
    _refuse_mistakes(resolved, document, skip=finished, elsewhere=joins)
    with _goes_on("stopped; the same command goes on from the last commit"):
        with Display(runs=[stage.name for stage in stages]) as display, _sink(metrics_port, display.note) as sink:
            drive(resolved, engine, address, display, sink)
        if launched_rank()[0] == 0:
            _print_results(resolved, stages)


@cli.command()
@_spec
@_set
@_profile
@_address
@click.option("--job", help="Id of the job; the default is poise-NAME.")
@click.option("--detach", is_flag=True, help="Return at once instead of following the log.")
def submit(
    spec: Path, assignments: Sequence[str], profile: str | None, address: str, job: str | None, detach: bool
) -> None:
    """Send a spec to a cluster as a job.

    Its log is followed until it ends; Ctrl-C leaves the job running.
    """
    from poise.engine import jobs

    resolved, document = _load(spec, assignments, profile)
    _refuse_mistakes(resolved, document, elsewhere=True)
    sent = jobs.submit(resolved, address, job)
    click.echo(f"job {sent} is on its way; poise status|logs|stop {sent} --address {address}")
    if not detach:
        with _goes_on(f"no longer followed; job {sent} goes on"):
            _finish_job(jobs.follow(sent, address, lambda text: click.echo(text, nl=False)))


@cli.command()
@click.argument("job")
@_address
def status(job: str, address: str) -> None:
    """Print the state of a job."""
    from poise.engine import jobs

    _print_job(jobs.status(job, address))


@cli.command()
@click.argument("job")
@_address
@click.option("--follow", is_flag=True, help="Go on until the job ends.")
def logs(job: str, address: str, follow: bool) -> None:
    """Print what a job has printed."""
    from poise.engine import jobs

    if follow:
        with _goes_on(f"no longer followed; job {job} goes on"):
            _finish_job(jobs.follow(job, address, lambda text: click.echo(text, nl=False)))
    else:
        click.echo(jobs.logs(job, address), nl=False)


@cli.command()
@click.argument("job")
@_address
def stop(job: str, address: str) -> None:
    """Stop a job; what its run has committed stays."""
    from poise.engine import jobs

    _print_job(jobs.stop(job, address))


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write; the default is report.html in the first run.",
)
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Write TensorBoard files into this folder too.")
def report(runs: Sequence[str], output: Path | None, tensorboard: Path | None) -> None:
    """Write a page about one or several runs.

    RUN is store/name, such as runs/quickstart-adt or s3://bucket/prefix/name; a bare name is one of the folder runs.
    """
    from poise.report.page import load_record
    from poise.report.publish import publish

    opened = [_open(name) for name in runs]
    records = [load_record(one) for one in opened]
    _warn_of_damages(records)
    if tensorboard is not None:
        from poise.observe.tensorboard import write_tensorboard

        for record in records:
            write_tensorboard(record.rows, tensorboard / record.name)
    with _writes(output):
        click.echo(publish(records, opened[0], output))


@cli.command()
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
        with _writes(output):
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{kind}.schema.json").write_text(text + "\n")
        click.echo(output / f"{kind}.schema.json")


@cli.group()
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
    found = list_runs(storage)
    if found:
        print_whole(run_list(found))
    else:
        click.echo(f"{storage.url} holds no run")


@runs.command("show")
@click.argument("run")
def runs_show(run: str) -> None:
    """Print a run: its state, checkpoints, what it has read, and its results."""
    from rich.console import Console

    from poise.report.page import load_record
    from poise.report.table import comparison, run_details, run_inputs

    opened = _open(run)
    record = load_record(opened)
    _warn_of_damages([record])
    read = run_inputs(opened)
    console = Console()
    for part in (*run_details(opened), *([read] if read else []), *comparison([record])):
        console.print(part)


@runs.command("verify")
@click.argument("run")
def runs_verify(run: str) -> None:
    """Compare every byte with its sha256.

    All that a run has committed is read again; the exit code is 1 if anything is damaged.
    """
    opened = _open(run)
    damages = opened.verify()
    for damage in damages:
        click.echo(str(damage))
    if damages:
        raise PoiseError(f"{len(damages)} damaged; the newest sound checkpoint is what the run goes on from")
    click.echo(f"{run}: {len(opened.checkpoints.commits())} checkpoints and all artifacts are sound")


@runs.command("gc")
@click.argument("run")
@click.option(
    "--older-than",
    type=click.FloatRange(0),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Leave what is younger: it may be in use.",
)
def runs_gc(run: str, older_than: float) -> None:
    """Remove what writers that died have left behind.

    Half-written uploads and checkpoints that were set aside as damaged go; nothing that is committed is touched.
    """
    opened = _open(run)
    with opened.lease():  # nobody writes meanwhile, so that nothing under way is taken for an orphan
        removed = [*opened.checkpoints.sweep(older_than), *opened.storage.sweep(older_than, f"{opened.name}/")]
    for name in removed:
        click.echo(f"removed {name}")
    click.echo(f"{len(removed)} orphans removed")


@runs.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def runs_rm(names: Sequence[str], yes: bool) -> None:
    """Remove runs with all that they have committed.

    A run that is alive is refused. What is removed cannot be had again.
    """
    opened = [_open(name) for name in names]
    for count, run in enumerate(opened):
        if not yes and not _confirmed(run):
            raise PoiseError("nothing more was removed" if count else "nothing was removed")
        run.remove()
        click.echo(f"removed {run.url}")


def _confirmed(run: Run) -> bool:
    """Whether the answer is yes; the end of the input is none."""
    commits = len(run.checkpoints.commits())
    try:
        return click.confirm(f"remove {run.url}, {run.summary().status}, with {commits} checkpoints?")
    except click.Abort:
        click.echo(err=True)  # after the question, which stands open
        return False


@cli.group("cluster")
def cluster_group() -> None:
    """A Ray cluster on this machine, for several runs and jobs."""


_folder = click.option("--folder", type=click.Path(path_type=Path), help="Its record; the default is ~/.poise/MACHINE.")
_port = click.IntRange(1, 65535)


@cluster_group.command("up")
@_folder
@click.option("--port", type=_port, default=6379, show_default=True, help="Port that drivers join.")
@click.option("--dashboard-port", type=_port, default=8265, show_default=True, help="Port that jobs are sent to.")
@click.option("--cpus", type=click.IntRange(1), help="CPU cores to offer; the default is all of the machine.")
@click.option("--gpus", type=click.IntRange(0), help="GPUs to offer; the default is all of the machine.")
def cluster_up(folder: Path | None, port: int, dashboard_port: int, cpus: int | None, gpus: int | None) -> None:
    """Start the cluster, unless it is up, and say how to use it."""
    from poise.engine import cluster

    folder = folder or cluster.default_folder()
    found = cluster.find(folder)
    up = found or cluster.up(folder, port, dashboard_port, cpus, gpus)
    click.echo(f"{'already up' if found else 'up'}: {up.address}, dashboard {up.dashboard}")
    click.echo(f"poise run SPEC --address {up.address}\npoise submit SPEC --address {up.dashboard}")


@cluster_group.command("down")
@_folder
def cluster_down(folder: Path | None) -> None:
    """End the cluster, with all that runs on it; other clusters are left alone."""
    from poise.engine import cluster

    click.echo("down" if cluster.down(folder or cluster.default_folder()) else "nothing was up")


@cluster_group.command("status")
@_folder
def cluster_status(folder: Path | None) -> None:
    """Print where the cluster is, its machines and its jobs."""
    from poise.engine import cluster

    found = cluster.find(folder or cluster.default_folder())
    if found is None:
        raise UserError("no cluster is up here; start one with: poise cluster up")
    now = cluster.status(found)
    click.echo(f"up: {found.address}, dashboard {found.dashboard}\nmetrics: {found.endpoints}")
    for node in now.nodes:
        click.echo(f"machine {node.ip}: {', '.join(f'{amount:g} {name}' for name, amount in node.resources.items())}")
    for job in now.jobs:
        click.echo(f"job {job.submission_id}: {job.status.value}")


@cluster_group.command("token")
def cluster_token() -> None:
    """Make Ray's token unless there is one, and print where it is.

    Do so before `ray start`, which by itself starts a cluster that asks for nothing: whoever reaches it may run code.
    """
    from poise.engine.auth import ensure_token, token_file

    ensure_token()
    click.echo(token_file())


@contextmanager
def _writes(output: Path | None) -> Iterator[None]:
    """Say which place of `--output` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        if output is None or isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{output} cannot be written: {error.strerror}; name another place with --output") from None


def _load(spec: Path, assignments: Sequence[str], profile: str | None) -> tuple[RunSpec, Document]:
    from poise.kinds import KINDS
    from poise.spec import load_document

    return load_document(spec, KINDS, assignments, profile)


def _refuse_mistakes(spec: RunSpec, document: Document, *, skip: Collection[str] = (), elsewhere: bool = False) -> None:
    """SpecError with every reason why the spec cannot run, before anything is started or a name is claimed.

    What does not keep it from running is printed on stderr.

    `elsewhere`: it runs on a cluster, which may have what is absent here.
    """
    from poise.kinds.check import find_mistakes
    from poise.spec import SpecError

    found = [mistake for mistake in find_mistakes(spec, skip=skip) if not (elsewhere and mistake.absent)]
    if mistakes := [each for each in found if not each.is_note]:
        raise SpecError(list(dict.fromkeys(document.problem(each.path, each.message) for each in mistakes)))
    if launched_rank()[0] == 0:
        for note in found:
            click.echo(f"poise: {printable(str(document.problem(note.path, note.message)))}", err=True)


def _open(name: str) -> Run:
    """The run at `store/name`; a bare name is one of the folder `runs`."""
    from poise.store.runs import open_run

    store, slash, last = name.rstrip("/").rpartition("/")
    return open_run(store if slash else "runs", last, must_exist=True)


@contextmanager
def _sink(port: int | None, note: Any) -> Iterator[Sink]:
    """The sink of this process, served at `port`. Where Prometheus reads it, it also reads how the run ended.

    Of the processes that torchrun starts, the first alone serves: they would all want the same port.
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


def _print_results(spec: RunSpec, stages: Sequence[RunSpec]) -> None:
    from rich.console import Console

    from poise.report.page import load_record
    from poise.report.publish import publish
    from poise.report.table import comparison
    from poise.store.runs import open_run

    records = [load_record(open_run(stage.store, stage.name)) for stage in stages]
    _warn_of_damages(records)
    for table in comparison(records):
        Console().print(table, "")
    click.echo(f"page: {publish(records, open_run(spec.store, spec.name))}")


def _warn_of_damages(records: Sequence[RunRecord]) -> None:
    """Name on stderr every file of these runs that is missing or damaged: what it would have shown is left out."""
    for record in records:
        for damage in record.damages:
            click.echo(printable(f"poise: warning: {damage}"), err=True)


def _print_job(details: Any) -> None:
    click.echo(f"{details.submission_id}: {details.status.value}")
    if details.message:
        click.echo(printable(details.message))


def _finish_job(details: Any) -> None:
    _print_job(details)
    if details.status.value != "SUCCEEDED":
        sys.exit(details.driver_exit_code or 1)
