"""`--engine ray`: a Ray Train gang, restarted from the last commit when a worker dies.

What is committed lives in Poise's own store: rank 0 commits it, and no worker goes on before it has. Nothing is sent
through `ray.train.report`: Ray's controller records a report only when it polls, so a worker that dies in between would
lose a step that was already reported, and every worker would wait for the poll.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup

from poise import env
from poise.engine.auth import MISSING, private_folder, refuses_token
from poise.engine.board import BoardState, open_board
from poise.engine.errand import Errand, run_errand
from poise.engine.network import cluster_address, refusal
from poise.engine.session import absolute_store, claim, is_finished, located
from poise.engine.trainer import ProcessGroup, Trainer
from poise.errors import PoiseError, PreemptedError, UserError
from poise.observe.export import export
from poise.observe.progress import Display
from poise.observe.sinks import Sink, series_of
from poise.spec import RunSpec, SamplerSpec, WorkersSpec
from poise.spec.code import copy_code
from poise.store.storage import scratch_folder
from poise.train.preemption import PROCESS

__all__ = ["check_resources", "cluster", "run_gang"]


OnGroup = Callable[[PlacementGroup], None]
_HOST_AND_PORT = re.compile(r"[^/\s]+:\d+")


@contextmanager
def cluster(address: str | None, specs: Sequence[RunSpec], code: Sequence[str] = ()) -> Iterator[bool]:
    """Join the cluster at `address` (or RAY_ADDRESS), or start one on this machine for as long as the block lasts.

    `code` names modules of the user's own, which a cluster that is joined is sent. Yields whether it is a private one.
    """
    verbose = os.environ.get(env.RAY_LOGS) == "1"
    joined = cluster_address(address)
    joins = joined is not None
    if joined is not None:
        _check_address(joined)
    cpus = None if joins else max(os.cpu_count() or 1, *(_needs(spec)["CPU"] for spec in specs))
    alone = {} if joins else {**env.PRIVATE_CLUSTER, "RAY_TMPDIR": str(private_folder())}
    with env.defaults(alone), _sent_code(code if joins else ()) as runtime_env:
        try:
            ray.init(
                address=joined or "local",
                num_cpus=cpus,
                include_dashboard=None if joins else False,  # a cluster for one command has no visitors
                log_to_driver=verbose,
                logging_level="INFO" if verbose else "ERROR",
                runtime_env=runtime_env,
            )
        except AuthenticationError:
            raise UserError(f"the Ray cluster at {joined or 'this machine'} refuses this command: {MISSING}") from None
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers at {joined}: {error}") from None
        try:
            yield not joins
        finally:
            with _without_interrupts():
                ray.shutdown()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C while the block lasts: a second one would leave processes of the cluster behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)


@contextmanager
def _sent_code(code: Sequence[str]) -> Iterator[dict[str, str] | None]:
    """The environment of workers that have these modules of the user's own, as `poise submit` sends them.

    None where there is nothing to send, and in a job, whose workers have its modules already.
    """
    if not code or env.RAY_JOB in os.environ:
        yield None
        return
    with scratch_folder() as folder:
        copy_code(code, folder)
        yield {"working_dir": str(folder)}


def _check_address(address: str) -> None:
    """Say at once what Ray says after half a minute and more: nobody listens, or another token is asked for."""
    if not _HOST_AND_PORT.fullmatch(address):
        if address != "auto" and not address.startswith("ray://"):
            raise UserError(f"{address[:80]!r} is not the address of a Ray cluster: write HOST:PORT, such as HOST:6379")
        return
    if why := refusal(address):
        raise UserError(f"no Ray cluster answers at {address}: {why}; `poise cluster up` starts one on this machine")
    if refuses_token(address):
        raise UserError(f"the Ray cluster at {address} refuses this command: {MISSING}")


def run_gang(
    spec: RunSpec,
    display: Display,
    sink: Sink,
    *,
    private: bool = False,
    on_group: OnGroup | None = None,
) -> None:
    """Run `spec` on a gang of workers, from where it stopped. A finished run is left as it is.

    `private`: the cluster ends with this process. `on_group` is told what each gang has set aside for itself, before
    anything is shown of it: whoever ends this process otherwise has to give that back.
    """
    run = located(spec)
    if is_finished(run, spec):
        return
    check_resources(spec, display, private=private)
    with (
        series_of(sink, spec.name),
        claim(run, spec, display.note) as lease,
        scratch_folder() as scratch,
    ):
        display.note(f"[{spec.name}] starting {spec.workers.count} workers")
        board = open_board()
        errand = Errand(spec.kind, spec.model_dump_json(), absolute_store(spec), lease.token, os.getcwd(), board)
        with _watched(board, spec, display, sink, on_group or _nobody), PROCESS.deferred():
            _fit(_trainer(spec, errand, str(scratch), private), board)


def _trainer(spec: RunSpec, errand: Errand, scratch: str, private: bool) -> Trainer:
    workers = spec.workers
    count = workers.count if workers.min_count is None else (workers.min_count, workers.count)
    return Trainer(
        run_errand,
        private=private,
        train_loop_config={"errand": errand},
        backend_config=ProcessGroup("nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        run_config=RunConfig(
            name=spec.name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            worker_runtime_env={"env_vars": dict(workers.environment)},
        ),
    )


def _fit(trainer: Trainer, board: Any) -> None:
    try:
        trainer.fit()
    except SystemExit:
        # Ray's own handler of Ctrl-C aborts the workers, ends this process and says nothing.
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        state: BoardState = ray.get(board.read.remote())
        raise state.error or failure_of(error, state.attempts) from None
    state = ray.get(board.read.remote())
    if state.error is not None:
        raise state.error


def failure_of(error: TrainingFailedError, attempts: int) -> PoiseError:
    """What went wrong in the workers, as an error for people.

    A failure that a worker explains itself is raised as it is; a defect comes with its traceback. `attempts` is the
    number of gangs whose workers began.
    """
    rank, cause = _cause(error)
    if isinstance(cause, PoiseError):
        return cause
    begun = isinstance(error, WorkerGroupError)
    what = (
        f"worker {rank} failed, in attempt {attempts}; workers.max_failures allows no more"
        if begun
        else ("the workers could not be started")
    )
    return PoiseError(f"{what}. Commits are kept; the same command goes on from the last.\n{str(cause).strip()}")


def _cause(error: TrainingFailedError) -> tuple[int, BaseException]:
    """Rank and exception of the first worker that failed; Ray wraps what was raised in another process."""
    failures: dict[int, BaseException] = {0: error}
    if isinstance(error, WorkerGroupError):
        failures = error.worker_failures
    elif isinstance(error, ControllerError):
        failures = {0: error.controller_failure}
    rank, failure = min(failures.items())
    return rank, getattr(failure, "cause", None) or failure


def _groups(spec: RunSpec) -> list[tuple[int, WorkersSpec | SamplerSpec]]:
    """How many processes there are of each kind: workers and, for a kind that has them, engines of the sampler."""
    workers, sampler = spec.workers, getattr(spec, "sampler", None)
    groups: list[tuple[int, WorkersSpec | SamplerSpec]] = [(workers.count, workers)]
    if isinstance(sampler, SamplerSpec):
        groups.append((sampler.engines, sampler))
    return groups


def _needs(spec: RunSpec) -> dict[str, int]:
    """CPUs and GPUs of all processes of a run."""
    groups = _groups(spec)
    return {
        "CPU": sum(count * each.cpus for count, each in groups),
        "GPU": sum(count * each.gpus for count, each in groups),
    }


def check_resources(spec: RunSpec, display: Display, *, private: bool) -> None:
    """Say so when the cluster as it is now cannot hold the run: Ray would wait without a word.

    A `private` cluster is this machine, to which nothing is added: UserError there.
    """
    for lack in _lacking(spec):
        if private:
            raise UserError(
                f"{spec.name} {lack} on this machine: ask for fewer (workers, sampler), or join a larger cluster with "
                "--address"
            )
        display.note(f"waiting: {spec.name} {lack} on the cluster; it goes on when machines are added")


def _lacking(spec: RunSpec) -> Iterator[str]:
    """What the cluster as it is now has too little of for a run, free or not: in all, or on one machine."""
    present, largest = ray.cluster_resources(), _largest_machine()
    for name, amount in _needs(spec).items():
        one = max(getattr(group, f"{name.lower()}s") for _, group in _groups(spec))
        if present.get(name, 0) < amount:
            yield f"needs {amount} {name}, and there are {present.get(name, 0):g}"
        elif largest.get(name, 0) < one:
            yield f"needs {one} {name} for one process, and no machine has more than {largest[name]:g}"


def _largest_machine() -> dict[str, float]:
    """The most that one machine has of each resource."""
    largest: dict[str, float] = {}
    for node in ray.nodes():
        for name, amount in node["Resources"].items() if node["Alive"] else ():
            largest[name] = max(amount, largest.get(name, 0))
    return largest


@contextmanager
def _watched(board: Any, spec: RunSpec, display: Display, sink: Sink, on_group: OnGroup) -> Iterator[None]:
    """Show what is on the board until the block ends."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(board, spec, display, sink, on_group, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _nobody(group: PlacementGroup) -> None:
    """Nobody has to be told: this process gives back what its gangs have set aside."""


def _watch(board: Any, spec: RunSpec, display: Display, sink: Sink, on_group: OnGroup, over: threading.Event) -> None:
    attempts, shown, seen = 1, None, 0
    group: PlacementGroup | None = None
    while True:
        ending = over.wait(0.5)
        state: BoardState = ray.get(board.read.remote(seen))
        if state.group is not None and state.group != group:
            group = state.group
            on_group(group)
        seen += len(state.evaluations)
        for evaluation in state.evaluations:
            display.show(evaluation)
        if state.attempts > attempts and state.error is None:  # else the gang that Ray has started ends at once
            display.note(f"[{spec.name}] a worker died; attempt {state.attempts} goes on from the last commit")
            sink.inc("poise_restarts_total", state.attempts - attempts, run=spec.name)
            attempts = state.attempts
        if state.progress is not None and state.progress != shown:
            shown = state.progress
            display.show(shown)
            export(sink, spec.name, shown.metrics)
            sink.set("poise_epoch", shown.epoch, run=spec.name)
        if PROCESS.reason is not None:
            _pass_on(PROCESS.reason, board, state)
        if ending:
            return


def _pass_on(reason: str, board: Any, state: BoardState) -> None:
    """Tell the workers that this driver was asked to end; once they have committed, it does."""
    if state.stop is None:
        board.stop.remote(reason)
    if isinstance(state.error, PreemptedError) and PROCESS.is_deferred:
        PROCESS.end_now(state.error)
