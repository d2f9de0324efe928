"""The environment variables that Poise reads or sets, with their defaults and reasons."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from poise.errors import UserError

__all__ = [
    "ALLOW_CODE",
    "CACHE",
    "COMMIT",
    "GRACE_S",
    "LOOPBACK_ALONE",
    "PRIVATE_CLUSTER",
    "RAY_DEFAULTS",
    "RAY_JOB",
    "RAY_LOGS",
    "STORE_PATIENCE_DEFAULT_S",
    "STORE_PATIENCE_S",
    "VLLM_ON_CPU",
    "VLLM_SETTINGS",
    "defaults",
    "grace_s",
    "launched_rank",
]

RAY_LOGS = "POISE_RAY_LOGS"
"""Set to 1 to print the output of Ray's processes and of the workers; by default it is only in Ray's logs."""

ALLOW_CODE = "POISE_ALLOW_CODE"
"""Set to 1 to run code of the user, which a spec names as package.module:attribute. `--allow-code` sets it for one
command, its workers and its job."""

CACHE = "POISE_CACHE"
"""Folder of caches, such as the hashes of large files; the default is ~/.cache/poise."""

COMMIT = "POISE_COMMIT"
"""Set by `poise submit` for its job, as JSON: the commit of the code that was sent, since the job has no repository."""

GRACE_S = "POISE_GRACE_S"
"""Seconds between the signal that asks a process to end and its kill; a step that takes longer is not committed. The
default is 25."""

LOOPBACK_ALONE = {
    # Intended for the firewalls of other systems: Ray uses 127.0.0.1 as the address of this machine, and all its
    # processes listen there. Without it GCS, raylet and agents listen on every interface. Read when ray is imported.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Set for a cluster of this machine alone, in the processes of the cluster and in those that join it."""

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the process of a job: the runtime environment from `poise submit`, which all its workers have too."""

STORE_PATIENCE_S = "POISE_STORE_PATIENCE_S"
"""Seconds for which a run waits for an S3 service that has answered before and fails now."""

STORE_PATIENCE_DEFAULT_S = 900.0

RAY_DEFAULTS = {
    # Seconds after which the controller notices a dead worker or the end of a run; each poll interrupts every worker.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1.0",
    # Ray starts workers at niceness 15, so that every other process of the machine would run before the training.
    "RAY_worker_niceness": "0",
    # Otherwise prints of workers appear twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Relative paths of a spec refer to the same files in a worker as in the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # No data about a run is sent out of the cluster.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Tune prints no table in the terminal, writes no log files, and leaves Ctrl-C to the driver.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Trials also report progress without a metric, which the scheduler ignores.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
"""Set for Ray unless the user has set them."""

PRIVATE_CLUSTER = {
    # The cluster is one machine for one command: nobody reads its metrics and events, and no single node is preempted.
    # Collecting them would interrupt single workers, for which all the others wait.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    # Ray would start a worker per core in advance. All but one could not be used, since they lack the environment of a
    # worker group.
    "RAY_prestart_worker_first_driver": "0",
}
"""Set, unless the user has set them, for a cluster that a command starts on this machine and ends with itself."""

VLLM_SETTINGS = {
    # Run the engine in the actor's process: it starts in a tenth of the time, and its weights can be read back.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Otherwise threads are pinned to cores that the training workers use too.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # No data about a run is sent out of the cluster, and nothing is downloaded from a hub.
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Set in the process of every vLLM engine."""

VLLM_ON_CPU = {
    # For an eager engine on a CPU vLLM compiles only a count of tokens, which takes seconds and needs a C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Set in addition to VLLM_SETTINGS in the process of an engine without a GPU."""


@contextmanager
def defaults(values: Mapping[str, str]) -> Iterator[None]:
    """While the block runs, set the environment variables of `values` that are not set already."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def launched_rank() -> tuple[int, int, int]:
    """Rank, world size and local rank from the variables of `torchrun`; (0, 1, 0) in a process without a launcher.

    Raises UserError for values that a launcher does not set.
    """
    rank = _count("RANK", 0)
    world_size = _count("WORLD_SIZE", 1)
    local_rank = _count("LOCAL_RANK", 0)
    if rank >= world_size:  # then no process would have rank 0, which writes all results
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size}: set both as torchrun does, or unset both")
    return rank, world_size, local_rank


def _count(name: str, default: int) -> int:
    """A non-negative integer from an environment variable."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, not a count: unset it, or start the processes with torchrun")
    return int(text)


def grace_s() -> float:
    """Seconds in which a process must end after a signal; less than the 30 of Slurm and Kubernetes by default."""
    try:
        return max(0.0, float(os.environ.get(GRACE_S) or 25))
    except ValueError:
        return 25.0
