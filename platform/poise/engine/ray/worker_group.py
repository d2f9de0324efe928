"""`--engine ray`: a Ray Train worker group, restarted from the last commit when a worker dies.

Commits are in Poise's own store: rank 0 writes them, and every worker waits for it. `ray.train.report` is not used:
Ray's controller records a report only when it polls, so a worker that dies in between would lose a step that was
already reported, and every worker would wait for the poll.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray import cloudpickle
from ray.exceptions import AuthenticationError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup

from poise import env
from poise.engine.lifecycle import (
    absolute_store,
    claim,
    is_finished,
    located,
)
from poise.engine.network import cluster_address, refusal
from poise.engine.ray.auth import MISSING, private_folder, refuses_token
from poise.engine.ray.coordinator import CoordinatorState, start_coordinator
from poise.engine.ray.process_group import PrivateTrainer, ProcessGroup
from poise.engine.ray.worker_args import WorkerArgs, run_worker
from poise.errors import PoiseError, PreemptedError, UserError
from poise.observe.export import export
from poise.observe.progress import Display, Progress
from poise.observe.sinks import Sink, series_of
from poise.spec import RunSpec, SamplerSpec, WorkersSpec
from poise.spec.code import copy_code
from poise.store.storage import scratch_folder
from poise.train.preemption import PROCESS
from poise.user_code import is_code_allowed

__all__ = ["check_resources", "cluster", "run_worker_group"]


OnGroup = Callable[[PlacementGroup], None]
_END_WITHIN_S = 10.0
_HOST_AND_PORT = re.compile(r"[^/\s]+:\d+")


@contextmanager
def cluster(address: str | None, specs: Sequence[RunSpec], code: Sequence[str] = ()) -> Iterator[bool]:
    """Join the cluster at `address` (or RAY_ADDRESS), or start one on this machine for as long as the block runs.

    `code` names modules of the user, which are sent to a cluster that is joined. Yields whether the cluster is private:
    started here, and ended with the block.
    """
    verbose = os.environ.get(env.RAY_LOGS) == "1"
    join_address = cluster_address(address)
    private = join_address is None
    if join_address is not None:
        _check_address(join_address)
    # A private cluster offers a CPU for every process of the largest run, also on a machine with fewer cores.
    cpus = max(os.cpu_count() or 1, *(_needs(spec)["CPU"] for spec in specs)) if private else None
    variables = {**env.PRIVATE_CLUSTER, "RAY_TMPDIR": str(private_folder())} if private else {}
    with env.defaults(variables), _code_environment(code, private=private) as code_environment:
        try:
            ray.init(
                address=join_address or "local",
                num_cpus=cpus,
                include_dashboard=False if private else None,  # nobody opens the dashboard of a single command
                log_to_driver=verbose,
                logging_level="INFO" if verbose else "ERROR",
                runtime_env=_with_address(code_environment, join_address),
            )
        except AuthenticationError:
            where = join_address or "this machine"
            raise UserError(f"the Ray cluster at {where} refuses this command: {MISSING}") from None
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers at {join_address}: {error}") from None
        try:
            yield private
        finally:
            with _without_interrupts():
                processes = _ray_descendants() if private else []
                ray.shutdown()
                _end(processes)


def _ray_descendants() -> list[psutil.Process]:
    """The processes of Ray's actors and tasks below this process."""
    descendants = psutil.Process().children(recursive=True)
    return [process for process in descendants if _title(process).startswith("ray::")]


def _title(process: psutil.Process) -> str:
    """The first word of a process's command line, which Ray sets; empty if the process has ended."""
    try:
        return str(next(iter(process.cmdline()), ""))
    except psutil.Error:
        return ""


def _end(processes: Sequence[psutil.Process]) -> None:
    """Wait until these processes have ended by themselves, and kill those that have not.

    They end when they notice that Ray's process on this machine is gone. One that starts at that moment may not.
    """
    deadline = time.monotonic() + _END_WITHIN_S
    remaining = [process for process in processes if _is_alive(process)]
    while remaining and time.monotonic() < deadline:
        time.sleep(0.05)
        remaining = [process for process in remaining if _is_alive(process)]
    for process in remaining:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(remaining, timeout=1)


def _is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and whose parent has not noticed (a zombie) does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C while the block runs: a second one would leave processes of the cluster behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)


@contextmanager
def _code_environment(code: Sequence[str], *, private: bool) -> Iterator[dict[str, Any]]:
    """Yield a Ray runtime environment with these modules of the user, as `poise submit` sends them.

    It also carries the permission to run them. It is empty where the workers have both already: those of a private
    cluster are processes of this machine, and those of a job have the runtime environment of the job.
    """
    if private or env.RAY_JOB in os.environ or not is_code_allowed():
        yield {}
        return
    runtime_env: dict[str, Any] = {"env_vars": {env.ALLOW_CODE: "1"}}
    if not code:
        yield runtime_env
        return
    with scratch_folder() as folder:
        copy_code(code, folder)
        yield {**runtime_env, "working_dir": str(folder)}


def _with_address(runtime_env: dict[str, Any], address: str | None) -> dict[str, Any]:
    """The runtime environment in which Ray's own actors ask the cluster at `address` about itself.

    One of them asks whether the run is alive. It looks for a cluster on its machine, and may find another one, or that
    of a head that was killed: then each run ends 12 s late, and the workers of a killed run are not removed.
    """
    if address is None or not _HOST_AND_PORT.fullmatch(address):
        return runtime_env
    return {**runtime_env, "env_vars": {**runtime_env.get("env_vars", {}), "RAY_API_SERVER_ADDRESS": address}}


def _check_address(address: str) -> None:
    """Raise UserError at once where Ray takes half a minute or more: nothing listens, or the token is refused."""
    if not _HOST_AND_PORT.fullmatch(address):
        if address != "auto" and not address.startswith("ray://"):
            raise UserError(f"{address[:80]!r} is not the address of a Ray cluster: write HOST:PORT, such as HOST:6379")
        return
    if why := refusal(address):
        raise UserError(f"no Ray cluster answers at {address}: {why}; `poise cluster up` starts one on this machine")
    if refuses_token(address):
        raise UserError(f"the Ray cluster at {address} refuses this command: {MISSING}")


def run_worker_group(
    spec: RunSpec,
    display: Display,
    sink: Sink,
    *,
    private: bool = False,
    on_group: OnGroup | None = None,
) -> None:
    """Run `spec` on a group of workers, from its last commit if it has one. Does nothing for a finished run.

    `private`: the cluster ends with this process. `on_group` is called with the placement group of each worker group
    before any of its progress is shown: a caller that may kill this process has to remove the placement group.
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
        coordinator = start_coordinator()
        # cloudpickle sends a class of the user's own script too, where pickle would send its name.
        pickled_spec = cloudpickle.dumps(spec)
        args = WorkerArgs(pickled_spec, absolute_store(spec), lease.token, os.getcwd(), coordinator)
        with _watch(coordinator, spec, display, sink, on_group or _ignore_group), PROCESS.deferred():
            _fit(_trainer(spec, args, str(scratch), private), coordinator)


def _trainer(spec: RunSpec, args: WorkerArgs, scratch: str, private: bool) -> DataParallelTrainer:
    """Ray's trainer for the worker group of `spec`; Ray's own files are written into `scratch`.

    TorchTrainer is a DataParallelTrainer that imports torch, which takes seconds, in Ray's controller.
    """
    workers = spec.workers
    count = workers.count if workers.min_count is None else (workers.min_count, workers.count)
    resources = {"CPU": workers.cpus}
    if workers.gpus:
        resources["GPU"] = workers.gpus
    trainer_class = PrivateTrainer if private else DataParallelTrainer
    return trainer_class(
        run_worker,
        train_loop_config={"args": args},
        backend_config=ProcessGroup("nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=spec.name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            worker_runtime_env={"env_vars": dict(workers.environment)},
        ),
    )


def _fit(trainer: DataParallelTrainer, coordinator: Any) -> None:
    """Run the worker group to its end; raises the error on the coordinator, or the failure that Ray reports."""
    try:
        trainer.fit()
    except SystemExit:
        # Ray's own handler of Ctrl-C aborts the workers and ends this process without a message.
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        state: CoordinatorState = ray.get(coordinator.read.remote())
        raise state.error or failure_of(error, state.attempts) from None
    state = ray.get(coordinator.read.remote())
    if state.error is not None:
        raise state.error


def failure_of(error: TrainingFailedError, attempts: int) -> PoiseError:
    """The failure of a worker group as a PoiseError.

    A PoiseError of a worker is returned as it is; any other exception is put into the message with its traceback.
    `attempts` is the number of worker groups whose workers began.
    """
    rank, cause = _cause(error)
    if isinstance(cause, PoiseError):
        return cause
    if isinstance(error, WorkerGroupError):
        what = f"worker {rank} failed, in attempt {attempts}; workers.max_failures allows no more"
    else:
        what = "the workers could not be started"
    return PoiseError(f"{what}. Commits are kept; the same command goes on from the last.\n{str(cause).strip()}")


def _cause(error: TrainingFailedError) -> tuple[int, BaseException]:
    """The lowest rank that failed, and its exception without Ray's wrapper of errors from other processes."""
    failures: dict[int, BaseException] = {0: error}
    if isinstance(error, WorkerGroupError):
        failures = error.worker_failures
    elif isinstance(error, ControllerError):
        failures = {0: error.controller_failure}
    rank, failure = min(failures.items())
    return rank, getattr(failure, "cause", None) or failure


def _groups(spec: RunSpec) -> list[tuple[int, WorkersSpec | SamplerSpec]]:
    """The number and the spec of each group of processes: the workers and, if there is a sampler, its engines."""
    groups: list[tuple[int, WorkersSpec | SamplerSpec]] = [(spec.workers.count, spec.workers)]
    sampler = getattr(spec, "sampler", None)
    if isinstance(sampler, SamplerSpec):
        groups.append((sampler.engines, sampler))
    return groups


def _needs(spec: RunSpec) -> dict[str, int]:
    """The number of CPUs and GPUs of all processes of a run."""
    groups = _groups(spec)
    return {
        "CPU": sum(count * each.cpus for count, each in groups),
        "GPU": sum(count * each.gpus for count, each in groups),
    }


def check_resources(spec: RunSpec, display: Display, *, private: bool) -> None:
    """Show a note for each resource of which the cluster has too little now: Ray would wait without a message.

    Raises UserError if the cluster is `private`: no machine can be added to it.
    """
    for lack in _lacks(spec):
        if private:
            raise UserError(
                f"{spec.name} {lack} on this machine: ask for fewer (workers, sampler), or join a larger cluster with "
                "--address"
            )
        display.note(f"waiting: {spec.name} {lack} on the cluster; it goes on when machines are added")


def _lacks(spec: RunSpec) -> Iterator[str]:
    """A text for each resource, free or in use, of which the cluster now has too little: in all, or on one machine."""
    totals = ray.cluster_resources()
    largest = _largest_machine()
    for name, amount in _needs(spec).items():
        per_process = max(getattr(group, f"{name.lower()}s") for _, group in _groups(spec))
        if totals.get(name, 0) < amount:
            yield f"needs {amount} {name}, and there are {totals.get(name, 0):g}"
        elif largest.get(name, 0) < per_process:
            yield f"needs {per_process} {name} for one process, and no machine has more than {largest[name]:g}"


def _largest_machine() -> dict[str, float]:
    """The largest amount of each resource that one machine has."""
    largest: dict[str, float] = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        for name, amount in node["Resources"].items():
            largest[name] = max(amount, largest.get(name, 0))
    return largest


@contextmanager
def _watch(coordinator: Any, spec: RunSpec, display: Display, sink: Sink, on_group: OnGroup) -> Iterator[None]:
    """Show the state of the coordinator while the block runs, from a thread that polls it twice a second."""
    done = threading.Event()
    thread = threading.Thread(target=_poll, args=(coordinator, spec, display, sink, on_group, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _ignore_group(group: PlacementGroup) -> None:
    """The default of `on_group`: Ray's trainer in this process removes its placement groups itself."""


def _poll(
    coordinator: Any, spec: RunSpec, display: Display, sink: Sink, on_group: OnGroup, done: threading.Event
) -> None:
    """Show and export what is new on the coordinator, until `done` is set and its last state is shown."""
    attempts = 1
    latest: Progress | None = None
    num_evaluations = 0
    group: PlacementGroup | None = None
    while True:
        is_last = done.wait(0.5)
        state: CoordinatorState = ray.get(coordinator.read.remote(num_evaluations))
        if state.group is not None and state.group != group:
            group = state.group
            on_group(group)
        num_evaluations += len(state.evaluations)
        for evaluation in state.evaluations:
            display.show(evaluation)
        # After an error that ends the run, the worker group that Ray starts next ends at once: it is no attempt.
        if state.attempts > attempts and state.error is None:
            display.note(f"[{spec.name}] a worker died; attempt {state.attempts} goes on from the last commit")
            sink.inc("poise_restarts_total", state.attempts - attempts, run=spec.name)
            attempts = state.attempts
        if state.progress is not None and state.progress != latest:
            latest = state.progress
            display.show(latest)
            export(sink, spec.name, latest.metrics)
            sink.set("poise_epoch", latest.epoch, run=spec.name)
        if PROCESS.reason is not None:
            _forward_stop(PROCESS.reason, coordinator, state)
        if is_last:
            return


def _forward_stop(reason: str, coordinator: Any, state: CoordinatorState) -> None:
    """Ask the workers to stop, since this driver was asked to end; end this process once they have committed."""
    if state.stop is None:
        coordinator.stop.remote(reason)
    if isinstance(state.error, PreemptedError) and PROCESS.is_deferred:
        PROCESS.end_now(state.error)
