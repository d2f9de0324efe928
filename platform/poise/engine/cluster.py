"""One Ray head on this machine that outlives the command that started it: `poise cluster up|status|down`.

Invariant: only what `up` itself has started is ever ended, known by its process id and the time at which it began.
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
from poise.engine.auth import ensure_token
from poise.errors import PoiseError, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

__all__ = ["Cluster", "Node", "Status", "default_folder", "down", "find", "status", "up"]

_UP_WITHIN_S, _DOWN_WITHIN_S = 120, 10
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_ANY_PORT = [f"--{name}-port=0" for name in ("min-worker", "max-worker", "dashboard-agent-listen")]
_RECORD, _LOG = "cluster.json", "head.log"
_SCRATCH = "poise-cluster-"
_RAYS_OWN = "ray"
"""Ray opens its folder to everybody, so it lies inside one that is its owner's alone."""


@dataclass(frozen=True)
class Cluster:
    """Where drivers join (`address`), where jobs are sent to (`dashboard`), its scratch folder, what `down` ends."""

    address: str
    dashboard: str
    scratch: str
    pid: int
    began: float

    @property
    def endpoints(self) -> str:
        """The file in which Ray lists its metrics' endpoints, for Prometheus (file_sd)."""
        return f"{self.scratch}/{_RAYS_OWN}/prom_metrics_service_discovery.json"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, and the resources that it has in all."""

    ip: str
    resources: dict[str, float]


@dataclass(frozen=True)
class Status:
    """What a cluster has and does."""

    nodes: list[Node]
    jobs: list[JobDetails]


def default_folder() -> Path:
    """A folder for each machine: a home may be shared by many."""
    return Path.home() / ".poise" / socket.gethostname().partition(".")[0]


def find(folder: Path) -> Cluster | None:
    """The cluster whose record is in `folder`, if it is still up."""
    cluster = _record(folder)
    return cluster if cluster and _processes(cluster) else None


def up(folder: Path, port: int, dashboard_port: int, cpus: int | None = None, gpus: int | None = None) -> Cluster:
    """Start a head and return when it takes jobs. Its record and its log are kept in `folder`.

    `cpus` and `gpus` are what it offers; None is what the machine has. Raises UserError when a port is taken,
    PoiseError with the end of the log when Ray does not start.
    """
    down(folder)  # forgets one that was killed
    for option, number in {"--port": port, "--dashboard-port": dashboard_port}.items():
        _check_free(option, number)
    ensure_token()  # a job is a program, and everybody on a machine reaches its loopback
    folder.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=_SCRATCH, dir="/tmp")  # the paths of Ray's sockets must be short
    offered = {"num-cpus": cpus, "num-gpus": gpus}
    options = [f"--{name}={value}" for name, value in offered.items() if value is not None]
    options += [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--temp-dir={scratch}/{_RAYS_OWN}"]
    options += [f"--ray-client-server-port={_free_port()}"]  # the default is that of every other cluster
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
    """End the cluster of `folder` with all that runs on it; whether there was one."""
    cluster = _record(folder)
    if cluster is None:
        return False
    processes = _processes(cluster)
    for process in processes[:1]:  # Ray ends its own processes, in an order that loses no log
        process.terminate()
    for process in psutil.wait_procs(processes, timeout=_DOWN_WITHIN_S)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    strays = _strays(cluster)
    for process in strays:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(strays, timeout=_DOWN_WITHIN_S)  # not for ever: a container may have nobody who reaps them
    shutil.rmtree(cluster.scratch, ignore_errors=True)
    (folder / _RECORD).unlink()
    return bool(processes)


def status(cluster: Cluster) -> Status:
    """Ask the dashboard of `cluster` for its machines and its jobs, the newest job first.

    Raises PoiseError when it does not answer.
    """
    from ray.util.state import list_nodes  # here: Ray reads when it is imported whether a token is wanted
    from ray.util.state.exception import RayStateApiException

    from poise.engine.jobs import connect

    with connect(cluster.dashboard) as client:
        jobs = sorted(client.list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
        try:
            alive = list_nodes(address=cluster.dashboard, filters=[("state", "=", "ALIVE")])
        except RayStateApiException as error:
            raise PoiseError(f"{cluster.dashboard} does not list its machines: {error}") from None
    return Status([Node(node.node_ip, _resources(node.resources_total)) for node in alive], jobs)


def _record(folder: Path) -> Cluster | None:
    """What `up` has noted. UserError for a record that is damaged: nothing is ended on the word of it."""
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
    """Whole or not at all: a record that is cut short leaves a cluster that nobody can end."""
    temporary = folder / f".{_RECORD}-{os.getpid()}"
    temporary.write_text(json.dumps(asdict(cluster)))
    temporary.replace(folder / _RECORD)


def _processes(cluster: Cluster) -> list[psutil.Process]:
    """The head and all that descends from it; nothing where its process id belongs to another process by now."""
    with suppress(psutil.NoSuchProcess):
        head = psutil.Process(cluster.pid)
        if abs(head.create_time() - cluster.began) < 1 and head.status() != psutil.STATUS_ZOMBIE:
            return [head, *head.children(recursive=True)]
    return []


def _strays(cluster: Cluster) -> list[psutil.Process]:
    """Processes of Ray that were started while the cluster ended and descend from it no more: they name its folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and any(cluster.scratch in part for part in process.info["cmdline"] or ())
    ]


def _check_free(option: str, port: int) -> None:
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
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs find `poise` and `python`
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
    """CPUs, GPUs and what else is counted, without Ray's own marks of a machine."""
    return {name: float(amount) for name, amount in total.items() if name in ("CPU", "GPU")}
