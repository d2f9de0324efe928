"""Every environment variable that Poise reads or sets, with its default and the reason for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from poise.errors import UserError

__all__ = [
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
"""Set to 1 to see what Ray's processes and the workers print; by default it is kept in Ray's logs only."""

CACHE = "POISE_CACHE"
"""Folder for what can be computed again, such as the hashes of large files; the default is ~/.cache/poise."""

COMMIT = "POISE_COMMIT"
"""Set by `poise submit` for its job, as JSON: the commit of the code that was sent, which has no repository there."""

GRACE_S = "POISE_GRACE_S"
"""Seconds from a signal to end to the kill that follows: a step that takes longer is given up. 25 unless set."""

LOOPBACK_ALONE = {
    # Made for the firewalls of other systems: Ray takes 127.0.0.1 for the address of this machine, and all that it
    # starts listens there. Without it GCS, raylet and agents listen on every interface. Read when ray is imported.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Set for a cluster of this machine alone, in the processes of the cluster and in those that join it."""

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the process of a job: the environment that `poise submit` has given all that the job starts."""

STORE_PATIENCE_S = "POISE_STORE_PATIENCE_S"
"""For how many seconds a run waits for an S3 service that has answered before and fails now."""

STORE_PATIENCE_DEFAULT_S = 900.0

RAY_DEFAULTS = {
    # How soon the controller sees a dead worker or the end of a run; each poll interrupts every worker.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1.0",
    # Ray starts workers at niceness 15: every other process of the machine would go before the training.
    "RAY_worker_niceness": "0",
    # Prints of workers would appear twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Relative paths of a spec mean the same in a worker as where the spec was read.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Nothing about a run leaves the cluster.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Tune keeps to itself: no table in the terminal, no files beside those of the store, and Ctrl-C ends the driver.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial reports before its first evaluation too; its scheduler passes over what has no metric yet.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
"""Set for Ray unless the user has set them."""

PRIVATE_CLUSTER = {
    # One machine that nobody takes away, watched by this command alone: what would tell others only takes turns from
    # the workers, who all wait for the one that was interrupted.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    # Ray would start a worker per core ahead, and all but one could not be used: they lack the environment of a gang.
    "RAY_prestart_worker_first_driver": "0",
}
"""Set, unless the user has set them, for a cluster that lives on this machine for as long as a command."""

VLLM_SETTINGS = {
    # The engine in the actor's own process: it starts in a tenth of the time, and its weights can be read back.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Threads pinned to cores would share them with the workers that train.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Nothing about a run leaves the cluster, and nothing is fetched from a hub.
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Set in the process of every vLLM engine."""

VLLM_ON_CPU = {
    # All that vLLM compiles for an eager engine on a CPU is a count of tokens; it takes seconds and a C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Set beside them in the process of an engine without a GPU."""


@contextmanager
def defaults(values: Mapping[str, str]) -> Iterator[None]:
    """Those of `values` that are not set, set for as long as the block lasts."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def launched_rank() -> tuple[int, int, int]:
    """Rank, world size and rank on this machine as `torchrun` tells them; (0, 1, 0) in a process started alone.

    Raises UserError when they cannot be those of a launcher.
    """
    rank, world_size, local = _count("RANK", 0), _count("WORLD_SIZE", 1), _count("LOCAL_RANK", 0)
    if rank >= world_size:  # such a process would lead nothing, and nothing would be written
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size}: set both as torchrun does, or unset both")
    return rank, world_size, local


def _count(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, not a count: unset it, or start the processes with torchrun")
    return int(text)


def grace_s() -> float:
    """Seconds in which a process that was asked to end has to; less than the 30 that Slurm and Kubernetes leave."""
    try:
        return max(0.0, float(os.environ.get(GRACE_S) or 25))
    except ValueError:
        return 25.0
