"""Runs of the real command line in processes of their own, that tests can kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fork_server import ForkServer
from poise.env import PRIVATE_CLUSTER
from poise.observe.rows import read_rows
from poise.store.lease import Lease
from poise.store.runs import Run, open_run

ROOT = Path(__file__).parents[2]

SPEC = """\
kind: robust.train
name: {name}
seed: 5
store: {store}
workers: {{count: {workers}, max_failures: 2}}
model: {{name: cnn, width: 8}}
data: {{name: digits, batch_size: 64, validation: 100, pad: 1}}
threats:
  linf: {{eps: 0.05, steps: 5}}
  l1: {{eps: 0.5, steps: 5}}
objective: {{name: adt}}
train:
  steps: {steps}
  optimizer: {{name: sgd, lr: 0.05}}
  schedule: {{name: cosine}}
  checkpoint: {{every: {{steps: 10}}, keep: 100}}
  evaluate_every: {{steps: 20}}
  log_every: 5
evaluate: {{num_examples: 60}}
"""


class Job:
    """One `poise run` in a process of its own."""

    def __init__(
        self, server: ForkServer, spec: Path, engine: str, address: str | None, run: Run, scratch: Path
    ) -> None:
        self.run = run
        self.output = scratch / f"{run.name}-{time.monotonic_ns()}.log"
        joined = ["--address", address] if address else []
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        arguments = ["-m", "poise", "run", str(spec), "--engine", engine, *joined]
        with self.output.open("wb") as output:
            self.process = server.start(arguments, output, output, env=environment, new_session=True)

    def wait(self, timeout: float = 240) -> int:
        return self.process.wait(timeout)

    def text(self) -> str:
        return self.output.read_text()

    def until(self, condition: Callable[[], Any], timeout: float = 120) -> Any:
        """Wait for something true, and fail at once if the process ends before it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if value := condition():
                return value
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text()}"
            time.sleep(0.05)
        raise AssertionError(f"waited {timeout} s for nothing:\n{self.text()}")

    def until_committed(self, count: int) -> None:
        self.until(lambda: len(self.run.checkpoints.commits()) >= count, timeout=300)

    def worker_pids(self) -> list[int]:
        return [event["pids"] for event in self.run.events() if event["event"] == "start"][-1]

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def newest(self, actor: str, below: int | None = None) -> psutil.Process:
        """The newest process of that Ray actor, below the head with that pid or in the private cluster."""
        family = psutil.Process(below or self.process.pid).children(recursive=True)
        found = [process for process in family if process.name().startswith(f"ray::{actor}")]
        return max(found, key=psutil.Process.create_time)

    def kill_one(self, actor: str, below: int | None = None) -> None:
        self.newest(actor, below).kill()


class Desk:
    """Starts jobs and reads what they leave."""

    def __init__(self, server: ForkServer, scratch: Path) -> None:
        self.server = server
        self.scratch = scratch
        self.jobs: list[Job] = []

    def spec(self, name: str, store: str, *, workers: int = 2, steps: int = 60, text: str = SPEC) -> Path:
        path = self.scratch / f"{name}.yaml"
        path.write_text(text.format(name=name, store=store, workers=workers, steps=steps))
        return path

    def start(self, name: str, store: str, engine: str = "ray", address: str | None = None, **changes: Any) -> Job:
        return self._start(self.spec(name, store, **changes), name, store, engine, address)

    def start_twice(self, store: str, text: str, *, address: str | None = None, **changes: Any) -> Job:
        """On one cluster, the run `whole`, for nothing to happen to, and then `killed`; `Job.run` is that one."""
        one = yaml.safe_load(text.format(name="", store="", **changes))
        shared = {key: value for key, value in one.items() if key not in ("name", "store")}
        stages = {name: {"use": "both", "name": name} for name in ("whole", "killed")}
        tree = {"kind": "pipeline", "name": "both", "store": store, "common": {"both": shared}, "stages": stages}
        path = self.scratch / "both.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return self._start(path, "killed", store, "ray", address)

    def finish_twice(self, store: str, text: str, **changes: Any) -> Run:
        """Go on with both to their end, and return `whole`."""
        job = self.start_twice(store, text, **changes)
        assert job.wait() == 0, job.text()
        return open_run(store, "whole")

    def _start(self, spec: Path, name: str, store: str, engine: str, address: str | None) -> Job:
        job = Job(self.server, spec, engine, address, open_run(store, name), self.scratch)
        self.jobs.append(job)
        return job

    def finish(self, name: str, store: str, engine: str = "ray", **changes: Any) -> Run:
        job = self.start(name, store, engine, **changes)
        assert job.wait() == 0, job.text()
        return job.run

    def end(self) -> None:
        for job in self.jobs:
            if job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()


@pytest.fixture
def desk(fork_server: ForkServer, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(fork_server, tmp_path)
    yield desk
    desk.end()


@dataclass(frozen=True)
class Head:
    """A Ray cluster that outlives drivers: where drivers join it, and where jobs are sent to."""

    address: str
    dashboard: str
    pid: int
    files: Path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def free_port() -> int:
    return _free_port()


@pytest.fixture
def poise(fork_server: ForkServer) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line, in a process of its own, from the root of the project."""

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", **changes}
        return fork_server.run(["-m", "poise", *arguments], cwd=ROOT, env=environment)

    return run


@pytest.fixture(scope="session")
def head(s3_settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One cluster for all tests that do not need one of their own; its workers may use the S3 service."""
    gcs, dashboard = _free_port(), _free_port()
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", f"--port={gcs}", "--num-cpus=2", "--disable-usage-stats"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"]
    # Ray looks for the cluster of a job in this folder: with one for all, a job would join the head of another process
    files = Path(tempfile.mkdtemp(prefix="ray-"))
    command.append(f"--temp-dir={files}")
    # what a head that was killed leaves where Ray looks for a cluster: nothing of a run may ask there
    (files / "ray").mkdir()
    (files / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an activated environment
    settings = {**s3_settings, **PRIVATE_CLUSTER}  # nobody reads metrics
    settings |= {"RAY_AUTH_MODE": "disabled", "PATH": path, "RAY_TMPDIR": str(files)}
    process = subprocess.Popen(
        command,
        env={**os.environ, **settings},
        cwd=tmp_path_factory.mktemp("ray"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _wait_for(dashboard, process)
    yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", process.pid, files)
    for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            each.kill()  # all at once: taking turns, as on SIGTERM, they need more than 15 s
    process.wait()
    shutil.rmtree(files, ignore_errors=True)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the Ray head did not start"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError("the Ray head did not answer in 120 s")


@pytest.fixture(scope="session")
def uninterrupted(head: Head, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The run that nothing happened to, by two Ray workers, in a folder."""
    scratch = tmp_path_factory.mktemp("uninterrupted")
    desk = Desk(fork_server, scratch)
    yield desk.finish("whole", str(scratch / "runs"), address=head.address)
    desk.end()


@pytest.fixture(scope="session")
def alone(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The run that nothing happened to, by one process, in a folder."""
    scratch = tmp_path_factory.mktemp("alone")
    desk = Desk(fork_server, scratch)
    yield desk.finish("whole", str(scratch / "runs"), "local", workers=1)
    desk.end()


def _tensors(run: Run, step: int, into: Path) -> dict[str, torch.Tensor]:
    folder = run.checkpoints.fetch(run.checkpoints.at(step), into)
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "rng.safetensors"]
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def _facts(run: Run) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    summary = re.sub(rb'"run": "[^"]*"', b"", run.read("result.json"))
    matrices = {name: run.read(name) for name in run.files("artifacts/evaluation")}
    rows = read_rows(run.read(name) for name in run.files("metrics/") if "timing" not in name).to_pylist()
    return {"summary": summary, "matrices": matrices, "rows": rows}


@pytest.fixture
def artifacts() -> Callable[[Run], dict[str, bytes]]:
    """What a run has found, its name and its page aside."""

    def read(run: Run) -> dict[str, bytes]:
        names = [*run.files("artifacts/"), *run.files("result.json")]
        found = {name: run.read(name) for name in names if not name.endswith(".html")}
        return {name: data.replace(f'"{run.name}"'.encode(), b"") for name, data in found.items()}

    return read


@pytest.fixture
def assert_same(tmp_path: Path) -> Callable[[Run, Run], None]:
    """Two finished runs have the same checkpoints bit by bit, the same metrics and the same evaluation."""

    def check(one: Run, other: Run) -> None:
        steps = [commit.step for commit in one.checkpoints.commits()]
        assert steps == [commit.step for commit in other.checkpoints.commits()]
        for step in steps:
            mine, theirs = (_tensors(run, step, tmp_path / f"{step}-{i}") for i, run in enumerate((one, other)))
            assert mine.keys() == theirs.keys()
            assert not [name for name in mine if not torch.equal(mine[name], theirs[name])], f"step {step}"
        mine, theirs = _facts(one), _facts(other)
        assert mine["rows"] == theirs["rows"]
        assert mine["summary"] == theirs["summary"]
        assert mine["matrices"] == theirs["matrices"]

    return check


@pytest.fixture
def ended_in_good_order() -> Callable[[Run, int], int]:
    """A run that a signal ended: its lease is free, its record says so, all is sound. Returns its last commit."""

    def check(run: Run, committed_before: int) -> int:
        assert not Lease.is_held(run.storage, run.name)
        assert run.events()[-1]["event"] == "preempted"
        assert run.summary().status == "interrupted"
        assert run.verify() == []
        last = run.checkpoints.commits()[-1].step
        assert last >= committed_before
        return last

    return check
