"""Runs as Ray jobs: the same spec, sent to a cluster with the package that reads it."""

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
from poise.engine.auth import MISSING
from poise.engine.drive import stages_of
from poise.errors import PoiseError, UserError
from poise.observe.environment import environment
from poise.spec import RunSpec, dump
from poise.spec.code import copy_code, own_code
from poise.store.storage import scratch_folder

__all__ = ["connect", "follow", "job_id", "logs", "pack", "status", "stop", "submit"]

_AGENT_WITHIN_S = 60
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


def job_id(spec: RunSpec) -> str:
    """The id of the job of a run. A run has one job at a time, so its name is enough until that one has ended."""
    return f"poise-{spec.name}"


def submit(spec: RunSpec, address: str, job: str | None = None) -> str:
    """Send `spec` to the cluster at `address` (http://host:8265) and return the id of its job.

    Raises UserError when no cluster answers or a job of that id exists and has not ended.
    """
    job = _checked(job or job_id(spec))
    with scratch_folder() as folder, ExitStack() as stack:
        pack(spec, folder)
        client = stack.enter_context(connect(address))
        _make_way(client, job)
        _send(
            client,
            entrypoint="python -m poise run spec.yaml --engine ray",
            submission_id=job,
            entrypoint_num_cpus=0,
            runtime_env={
                "working_dir": str(folder),
                "py_modules": [str(Path(poise.__file__).parent)],
                "env_vars": {env.COMMIT: json.dumps(environment()["git"])},
            },
            metadata={"run": spec.name, "kind": spec.kind},
        )
    return job


def status(job: str, address: str) -> JobDetails:
    """What the cluster knows of a job."""
    _checked(job)
    with connect(address) as client:
        return _info(client, job)


def logs(job: str, address: str) -> str:
    """All that a job has printed."""
    _checked(job)
    with connect(address) as client:
        _info(client, job)
        return str(client.get_job_logs(job))


def follow(job: str, address: str, write: Callable[[str], None]) -> JobDetails:
    """Pass on what a job prints until it ends. Leaving (Ctrl-C) does not stop the job."""
    _checked(job)
    with connect(address) as client:
        asyncio.run(_tail(client, job, write))
        return _info(client, job)


def stop(job: str, address: str) -> JobDetails:
    """Ask a job to stop; what its run has committed stays."""
    _checked(job)
    with connect(address) as client:
        _info(client, job)
        client.stop_job(job)
        return _info(client, job)


def _send(client: JobSubmissionClient, **job: Any) -> None:
    """Submit; a head that has just started has its agent some seconds later than its dashboard."""
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
    """Write into `folder` what a job runs in: the spec, and the modules of the user's own that it names.

    A module comes with every module that it imports from its folder. Other files that it reads are not seen: it names
    them by an absolute path.

    Raises:
        UserError: a place that only this machine knows, or a module that is not here.
    """
    _check_places(spec)
    (folder / "spec.yaml").write_text(dump(spec))
    copy_code(own_code([spec]), folder)


def _check_places(spec: RunSpec) -> None:
    """A job runs in a folder that Ray makes for it and throws away: nothing may be kept in or read from there."""
    places = [("store", stage.store) for stage in stages_of(spec)]
    places += [(each.where, each.place) for each in spec.inputs() if each.kind == "files"]
    for name, place in places:
        if "://" not in place and not Path(place).is_absolute():
            raise UserError(
                f"{name}: {place} is relative to this folder, which no job sees: write a place that every node of the "
                f"cluster shares, such as --set {name}=/shared/{place}, or s3://bucket/prefix"
            )


def _check_address(address: str) -> None:
    """Ray takes more forms, and waits half a minute for some of them."""
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0 and address.isprintable()
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"{address[:80]!r} is not the address of a dashboard: write http://HOST:8265")


async def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
    async for chunk in client.tail_job_logs(job):
        write(chunk)


def _make_way(client: JobSubmissionClient, job: str) -> None:
    """Forget an ended job of the same id; its run goes on from its last commit."""
    known = {details.submission_id: details.status for details in client.list_jobs()}
    if job not in known:
        return
    if known[job] not in _ENDED:
        raise UserError(
            f"job {job} is {known[job]} already; `poise logs {job}` follows it and `poise stop {job}` ends it"
        )
    client.delete_job(job)


def _checked(job: str) -> str:
    """An id that fits into an address and a file name, as Ray's own do; UserError for any other."""
    if not _JOB.fullmatch(job):
        raise UserError(
            f"{job[:40]!r} is not the id of a job: 1 to 128 letters, digits, '.', '_' or '-', the first no sign"
        )
    return job


def _info(client: JobSubmissionClient, job: str) -> JobDetails:
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "does not exist" in str(error) or "404" in str(error):
            raise UserError(f"the cluster knows no job {job}") from None
        raise PoiseError(f"the cluster did not answer for job {job}: {error}") from None


@contextmanager
def connect(address: str) -> Iterator[JobSubmissionClient]:
    """The dashboard at `address`; UserError when none answers there, or it wants a token that is not here."""
    _check_address(address)
    logging.getLogger("ray").setLevel(logging.WARNING)  # its notes on uploads are not what the caller asked for
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(f"the Ray cluster at {address} refuses this command: {MISSING}") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from None
    yield client
