"""Runs as Ray jobs: a spec is sent to a cluster together with the package that reads it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import poise
from poise import env
from poise.engine.ray.auth import MISSING
from poise.errors import PoiseError, UserError
from poise.kinds.code import named_code
from poise.observe.environment import environment
from poise.spec import RunSpec, dump
from poise.spec.code import copy_code, own_code
from poise.store.storage import scratch_folder
from poise.user_code import is_code_allowed

__all__ = ["connect", "follow", "job_id", "logs", "pack", "status", "stop", "submit"]

_AGENT_WITHIN_S = 60
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


def job_id(spec: RunSpec) -> str:
    """The id of the job of a run. A run has one job at a time, so its name is unique until that job has ended."""
    return f"poise-{spec.name}"


def submit(spec: RunSpec, address: str, job: str | None = None) -> str:
    """Send `spec` to the cluster at `address` (http://host:8265) and return the id of its job.

    Code of the user may run in the job if it may run in this process.

    Raises UserError when no cluster answers or a job of that id exists and has not ended.
    """
    job = job or job_id(spec)
    _validate_job_id(job)
    with scratch_folder() as folder, ExitStack() as stack:
        pack(spec, folder)
        client = stack.enter_context(connect(address))
        variables = {env.COMMIT: json.dumps(environment()["git"])}
        if is_code_allowed():
            variables[env.ALLOW_CODE] = "1"
        _delete_ended(client, job)
        _send(
            client,
            entrypoint="python -m poise run spec.yaml --engine ray",
            submission_id=job,
            entrypoint_num_cpus=0,
            runtime_env={
                "working_dir": str(folder),
                "py_modules": [str(Path(poise.__file__).parent)],
                "env_vars": variables,
            },
            metadata={"run": spec.name, "kind": spec.kind},
        )
    return job


def status(job: str, address: str) -> JobDetails:
    """The details of a job, as the cluster records them."""
    _validate_job_id(job)
    with connect(address) as client:
        return _info(client, job)


def logs(job: str, address: str) -> str:
    """All output of a job so far."""
    _validate_job_id(job)
    with connect(address) as client:
        _info(client, job)
        return str(client.get_job_logs(job))


def follow(job: str, address: str, write: Callable[[str], None]) -> JobDetails:
    """Pass the output of a job to `write` until the job ends. Ctrl-C here does not stop the job."""
    _validate_job_id(job)
    with connect(address) as client:
        asyncio.run(_tail(client, job, write))
        return _info(client, job)


def stop(job: str, address: str) -> JobDetails:
    """Ask a job to stop. The commits of its run stay."""
    _validate_job_id(job)
    with connect(address) as client:
        _info(client, job)
        client.stop_job(job)
        return _info(client, job)


def _send(client: JobSubmissionClient, **job: Any) -> None:
    """Submit a job. Retries while a head that has just started has no agent: it starts after the dashboard."""
    deadline = time.monotonic() + _AGENT_WITHIN_S
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise PoiseError(f"the cluster did not take the job: {error}") from None
        time.sleep(1)


def pack(spec: RunSpec, folder: Path) -> None:
    """Write the working folder of a job into `folder`: the spec, and the user's modules that it names.

    A module is copied with every module that it imports from its folder. Other files that it reads are not copied: it
    must name them by an absolute path.

    Raises:
        UserError: a path relative to the current folder, or a module that does not exist.
    """
    _check_paths(spec)
    (folder / "spec.yaml").write_text(dump(spec))
    copy_code(own_code(code.reference for code in named_code(spec)), folder)


def _check_paths(spec: RunSpec) -> None:
    """Raise UserError for a relative path of a store or an input: Ray removes the folder in which a job runs."""
    from poise.engine.launch import stages_of  # imports torch, which the status and the logs of a job do not need

    paths = [("store", stage.store) for stage in stages_of(spec)]
    paths += [(each.where, each.place) for each in spec.inputs() if each.kind == "files"]
    for name, path in paths:
        if "://" not in path and not Path(path).is_absolute():
            raise UserError(
                f"{name}: {path} is relative to this folder, which a job cannot read: write a path that every node of "
                f"the cluster shares, such as --set {name}=/shared/{path}, or s3://bucket/prefix"
            )


def _check_address(address: str) -> None:
    """Raise UserError unless `address` is a URL. Ray accepts other forms, and waits half a minute for some of them."""
    try:
        parts = urlsplit(address)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_valid = has_host and (parts.port or 1) > 0 and address.isprintable()
    except ValueError:
        is_valid = False
    if not is_valid:
        raise UserError(f"{address[:80]!r} is not the address of a dashboard: write http://HOST:8265")


async def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
    async for chunk in client.tail_job_logs(job):
        write(chunk)


def _delete_ended(client: JobSubmissionClient, job: str) -> None:
    """Delete an ended job of the same id from the cluster's list; UserError if that job has not ended."""
    statuses = {details.submission_id: details.status for details in client.list_jobs()}
    if job not in statuses:
        return
    if statuses[job] not in _ENDED:
        raise UserError(
            f"job {job} is {statuses[job]} already; `poise logs {job}` follows it and `poise stop {job}` ends it"
        )
    client.delete_job(job)


def _validate_job_id(job: str) -> None:
    """Raise UserError unless `job` fits into a URL and a file name, as the ids that Ray makes do."""
    if not _JOB.fullmatch(job):
        raise UserError(
            f"{job[:40]!r} is not the id of a job: write 1 to 128 letters, digits, '.', '_' or '-', and begin with a "
            "letter or a digit"
        )


def _info(client: JobSubmissionClient, job: str) -> JobDetails:
    """The details of a job; UserError if the cluster has none of that id, PoiseError if it does not answer."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "does not exist" in str(error) or "404" in str(error):
            raise UserError(f"the cluster has no job {job}; `poise cluster status` lists its jobs") from None
        raise PoiseError(f"the cluster did not answer for job {job}: {error}") from None


@contextmanager
def connect(address: str) -> Iterator[JobSubmissionClient]:
    """A client of the dashboard at `address`. UserError when none answers there, or it refuses the token."""
    _check_address(address)
    logging.getLogger("ray").setLevel(logging.WARNING)  # without Ray's notes on uploads
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(f"the Ray cluster at {address} refuses this command: {MISSING}") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from None
    yield client
