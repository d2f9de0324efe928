"""`poise cluster up|status|down`: one real head through its whole life, and what is never ended."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from poise.engine import cluster
from poise.errors import PoiseError, UserError
from poise.store.runs import open_run

Run = Callable[..., subprocess.CompletedProcess[str]]

SPEC = """
kind: robust.train
name: tiny
store: {store}
model: {{name: cnn, width: 4}}
data: {{name: digits, batch_size: 64, validation: 20, limit: 200}}
threats: {{linf: {{eps: 0.1, steps: 1}}}}
objective: {{name: at}}
train: {{epochs: 1}}
evaluate: {{examples: 20, threats: {{linf: {{eps: 0.1, steps: 1}}}}}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def recorded(folder: Path, pid: int, began: float) -> cluster.Cluster:
    scratch = folder / "scratch"
    scratch.mkdir()
    made = cluster.Cluster("127.0.0.1:1", "http://127.0.0.1:1", str(scratch), pid, began)
    (folder / "cluster.json").write_text(json.dumps(asdict(made)))
    return made


def test_a_process_that_has_the_number_of_a_dead_head_is_left_alone(tmp_path, sleeper):
    recorded(tmp_path, sleeper.pid, psutil.Process(sleeper.pid).create_time() - 100)
    assert cluster.find(tmp_path) is None
    assert not cluster.down(tmp_path)
    assert sleeper.poll() is None
    assert list(tmp_path.iterdir()) == []


def test_what_was_started_is_ended_and_its_folder_with_it(tmp_path, sleeper):
    made = recorded(tmp_path, sleeper.pid, psutil.Process(sleeper.pid).create_time())
    assert cluster.find(tmp_path) == made
    assert cluster.down(tmp_path)
    assert not psutil.pid_exists(sleeper.pid)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_named_with_the_option_that_changes_it(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken.*--dashboard-port"):
            cluster.up(tmp_path, free_port(), port)
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_does_not_start_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_RAY", (sys.executable, "-c", "print('no space left'); raise SystemExit(1)"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(PoiseError, match=r"(?s)head\.log.*no space left"):
        cluster.up(tmp_path, free_port(), free_port())
    assert [file.name for file in tmp_path.iterdir()] == ["head.log"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A command of somebody whose home is empty, in a folder of theirs; their cluster does not outlive the test."""
    home, bin = tmp_path / "home", Path(sys.executable).parent
    (home / "work").mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(home), "PATH": f"{bin}:{kept['PATH']}", "OMP_NUM_THREADS": "1"}

    def start(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=home / "work", env={**environment, **changes}, capture_output=True, text=True, check=False
        )

    yield start
    start("poise", "cluster", "down")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_comes_takes_a_job_and_goes(run, tmp_path):
    home = tmp_path / "home"
    nothing = run("poise", "cluster", "status")
    assert (nothing.returncode, "poise cluster up" in nothing.stderr) == (2, True)
    assert run("poise", "cluster", "down").stdout == "nothing was up\n"

    ports = ("--port", str(free_port()), "--dashboard-port", str(free_port()))
    up = run("poise", "cluster", "up", "--cpus", "3", *ports)
    assert up.returncode == 0, up.stderr
    dashboard = f"http://127.0.0.1:{ports[3]}"
    assert up.stdout.startswith(f"up: 127.0.0.1:{ports[1]}, dashboard {dashboard}\n")
    (record,) = home.glob(".poise/*/cluster.json")
    made = cluster.Cluster(**json.loads(record.read_text()))
    again = run("poise", "cluster", "up", *ports)
    assert (again.returncode, again.stdout.startswith("already up: ")) == (0, True)
    assert cluster.find(record.parent) == made

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    refused = run("poise", "status", "any", "--address", dashboard, HOME=str(stranger))
    assert (refused.returncode, "asks for a token" in refused.stderr) == (2, True), refused.stderr

    (home / "work" / "tiny.yaml").write_text(SPEC.format(store=tmp_path / "runs"))
    submit = ("ray", "job", "submit", "--address", dashboard, "--working-dir", ".", "--submission-id", "mine")
    sent = run(*submit, "--", "poise", "run", "tiny.yaml", RAY_AUTH_MODE="token")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert open_run(str(tmp_path / "runs"), "tiny").manifest().status == "finished"
    known = run("poise", "status", "mine", "--address", dashboard)
    assert known.stdout.startswith("mine: SUCCEEDED\n"), known.stderr

    status = run("poise", "cluster", "status")
    assert status.returncode == 0, status.stderr
    assert "3 CPU" in status.stdout
    assert "job mine: SUCCEEDED" in status.stdout
    assert Path(made.scratch, "prom_metrics_service_discovery.json").is_file()

    processes = cluster._processes(made)
    assert len(processes) > 5
    assert run("poise", "cluster", "down").stdout == "down\n"
    assert not psutil.wait_procs(processes, timeout=10)[1]
    assert not Path(made.scratch).exists()
    assert run("poise", "cluster", "down").stdout == "nothing was up\n"
