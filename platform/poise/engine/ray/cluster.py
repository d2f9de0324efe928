"""One Ray head on this machine that outlives the command that started it: `poise cluster up|status|down`.

Invariant: `down` ends only what `up` started. It recognizes the head by process id and start time.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import TypeAdapter, ValidationError

from poise import env
from poise.engine.ray.auth import ensure_token
from poise.errors import PoiseError, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

__all__ = ["Cluster", "Node", "Status", "default_folder", "down", "find", "status", "up"]

_UP_WITHIN_S = 120
_DOWN_WITHIN_S = 10
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_ANY_PORT = [f"--{name}-port=0" for name in ("min-worker", "max-worker", "dashboard-agent-listen")]
_RECORD = "cluster.json"
_LOG = "head.log"
_SCRATCH = "poise-cluster-"
_RAY_FOLDER = "ray"
"""Ray's folder within the scratch folder. Ray makes it readable for every user; the scratch folder is private."""


@dataclass(frozen=True)
class Cluster:
    """The record of a cluster.

    `address` is HOST:PORT for drivers, `dashboard` the URL for jobs, `scratch` the folder of its files. `pid` and
    `began` (its start time in epoch seconds) identify the process of the head.
    """

    address: str
    dashboard: str
    scratch: str
    pid: int
    began: float

    @property
    def endpoints(self) -> str:
        """The file in which Ray lists its metrics endpoints for Prometheus (file_sd)."""
        return f"{self.scratch}/{_RAY_FOLDER}/prom_metrics_service_discovery.json"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster and its total resources."""

    ip: str
    resources: dict[str, float]


@dataclass(frozen=True)
class Status:
    """The machines of a cluster that are alive, and its jobs."""

    nodes: list[Node]
    jobs: list[JobDetails]


def default_folder() -> Path:
    """The folder of the record and the log: one per host name, since machines may share a home."""
    return Path.home() / ".poise" / socket.gethostname().partition(".")[0]


def find(folder: Path) -> Cluster | None:
    """The cluster whose record is in `folder`; None if there is none or its head has ended."""
    cluster = _read_record(folder)
    return cluster if cluster and _processes(cluster) else None


def up(folder: Path, port: int, dashboard_port: int, cpus: int | None = None, gpus: int | None = None) -> Cluster:
    """Start a head and return when it accepts jobs. Its record and its log are written into `folder`.

    `cpus` and `gpus` are the resources that it offers; None means all of the machine. Raises UserError when a port is
    taken, PoiseError with the end of the log when Ray does not start.
    """
    down(folder)  # removes the record of a head that was killed
    for option, number in {"--port": port, "--dashboard-port": dashboard_port}.items():
        _check_free(option, number)
    ensure_token()  # a job runs arbitrary code, and every user of a machine can reach its loopback
    folder.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=_SCRATCH, dir="/tmp")  # the paths of Ray's sockets must be short
    resources = {"num-cpus": cpus, "num-gpus": gpus}
    options = [f"--{name}={value}" for name, value in resources.items() if value is not None]
    options += [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--temp-dir={scratch}/{_RAY_FOLDER}"]
    options += [f"--ray-client-server-port={_free_port()}"]  # the default port may be taken by another cluster
    process = _start(options, folder)
    cluster = Cluster(
        f"127.0.0.1:{port}",
        f"http://127.0.0.1:{dashboard_port}",
        scratch,
        process.pid,
        psutil.Process(process.pid).create_time(),
    )
    _write_record(folder, cluster)
    try:
        _wait(cluster, process, folder)
    except BaseException:
        down(folder)
        raise
    return cluster


def down(folder: Path) -> bool:
    """End the cluster of `folder` with all that runs on it. Returns whether one was up."""
    cluster = _read_record(folder)
    if cluster is None:
        return False
    processes = _processes(cluster)
    for process in processes[:1]:  # only the head: Ray ends its own processes, in an order that loses no log
        process.terminate()
    _, survivors = psutil.wait_procs(processes, timeout=_DOWN_WITHIN_S)
    for process in survivors:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    orphans = _orphans(cluster)
    for process in orphans:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(orphans, timeout=_DOWN_WITHIN_S)  # with a timeout: in a container nothing may reap them
    shutil.rmtree(cluster.scratch, ignore_errors=True)
    (folder / _RECORD).unlink()
    return bool(processes)


def status(cluster: Cluster) -> Status:
    """The machines and the jobs that the dashboard of `cluster` lists, the newest job first.

    Raises PoiseError when it does not answer.
    """
    from ray.util.state import list_nodes  # imported here: Ray reads RAY_AUTH_MODE when it is imported
    from ray.util.state.exception import RayStateApiException

    from poise.engine.ray.jobs import connect

    with connect(cluster.dashboard) as client:
        jobs = sorted(client.list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
        try:
            alive = list_nodes(address=cluster.dashboard, filters=[("state", "=", "ALIVE")])
        except RayStateApiException as error:
            raise PoiseError(f"{cluster.dashboard} does not list its machines: {error}") from None
    nodes = [Node(node.node_ip, _resources(node.resources_total)) for node in alive]
    return Status(nodes, jobs)


def _read_record(folder: Path) -> Cluster | None:
    """The record that `up` wrote; None if there is none. UserError for a damaged one: no process is ended by it."""
    file = folder / _RECORD
    try:
        cluster = TypeAdapter(Cluster).validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        cluster = None
    if cluster is None or not Path(cluster.scratch).name.startswith(_SCRATCH) or cluster.pid <= 1:
        raise UserError(
            f"{file}: the record of the cluster is damaged. If its head is still up (ps -ef | grep gcs_server), end it "
            "by hand; then remove the file"
        )
    return cluster


def _write_record(folder: Path, cluster: Cluster) -> None:
    """Write the record atomically: with a truncated one, `down` could not end the cluster."""
    temporary = folder / f".{_RECORD}-{os.getpid()}"
    temporary.write_text(json.dumps(asdict(cluster)))
    temporary.replace(folder / _RECORD)


def _processes(cluster: Cluster) -> list[psutil.Process]:
    """The head and all its descendants; empty if the process id of the head now belongs to another process."""
    with suppress(psutil.NoSuchProcess):
        head = psutil.Process(cluster.pid)
        if abs(head.create_time() - cluster.began) < 1 and head.status() != psutil.STATUS_ZOMBIE:
            return [head, *head.children(recursive=True)]
    return []


def _orphans(cluster: Cluster) -> list[psutil.Process]:
    """Processes of Ray that were started while the cluster ended and are not descendants of its head.

    Their command lines name the scratch folder of the cluster.
    """
    orphans = []
    for process in psutil.process_iter(["cmdline"]):
        names_scratch = any(cluster.scratch in part for part in process.info["cmdline"] or ())
        if names_scratch and process.pid != os.getpid():
            orphans.append(process)
    return orphans


def _check_free(option: str, port: int) -> None:
    """Raise UserError if `port` of the loopback is taken; `option` is the flag that chooses another."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(
                f"port {port} is taken, perhaps by another Ray cluster; choose another with {option}"
            ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(options: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    command = [*_RAY, "start", "--head", "--block", "--dashboard-host=127.0.0.1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # so that jobs find `poise` and `python`
    with (folder / _LOG).open("wb") as log:
        return subprocess.Popen(
            [*command, *_ANY_PORT, *options],
            env={**os.environ, **env.LOOPBACK_ALONE, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(cluster: Cluster, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until the cluster lists a machine; PoiseError with the end of the log if it does not or its head ends."""
    deadline = time.monotonic() + _UP_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(PoiseError):
            if status(cluster).nodes:
                return
        time.sleep(0.5)
    log = folder / _LOG
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise PoiseError(f"Ray did not start; the end of {log}:\n{tail}")


def _resources(total: dict[str, Any]) -> dict[str, float]:
    """The CPUs and GPUs of a machine, without Ray's internal resources such as node:IP."""
    return {name: float(amount) for name, amount in total.items() if name in ("CPU", "GPU")}
