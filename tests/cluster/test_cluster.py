"""`poise cluster up|status|down`: one real head through its whole life, and what is never ended."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from fork_server import ForkServer
from poise.cli import cli
from poise.engine.ray import cluster
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
evaluate: {{num_examples: 20, threats: {{linf: {{eps: 0.1, steps: 1}}}}}}
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
    scratch = folder / "poise-cluster-x"
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


RECORD = {"address": "127.0.0.1:1", "dashboard": "http://127.0.0.1:1", "pid": 2, "began": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        "\x00" * 50,
        json.dumps({**RECORD, "scratch": ""}),
        json.dumps({**RECORD, "scratch": "/"}),
        json.dumps({**RECORD, "scratch": "/home/me"}),
        json.dumps({**RECORD, "scratch": "/tmp/poise-cluster-x", "pid": "2"}),
        json.dumps({**RECORD, "scratch": "/tmp/poise-cluster-x", "pid": -1}),
        json.dumps({**RECORD, "scratch": "/tmp/poise-cluster-x", "began": None}),
    ],
)
@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_a_damaged_record_is_named_and_nothing_is_ended_on_its_word(text, command, tmp_path):
    """An empty scratch folder would be part of every command line, and every process would be ended as a stray."""
    (tmp_path / "cluster.json").write_text(text)
    outcome = CliRunner().invoke(cli, ["cluster", command, "--folder", str(tmp_path)])
    assert isinstance(outcome.exception, UserError), outcome.output
    assert "cluster.json: the record of the cluster is damaged" in str(outcome.exception)
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.json"]


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
def run(fork_server: ForkServer, tmp_path: Path) -> Iterator[Run]:
    """A command of somebody whose home is empty, in a folder of theirs; their cluster does not outlive the test."""
    home, bin = tmp_path / "home", Path(sys.executable).parent
    (home / "work").mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(home), "PATH": f"{bin}:{kept['PATH']}", "OMP_NUM_THREADS": "1"}

    def start(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        options = {"cwd": home / "work", "env": {**environment, **changes}}
        program, *arguments = command
        if program == "poise":
            return fork_server.run(["-m", "poise", *arguments], **options)
        if program == sys.executable:
            return fork_server.run(arguments, **options)
        return subprocess.run(command, **options, capture_output=True, text=True, check=False)

    yield start
    start("poise", "cluster", "down")


JOIN = """\
import sys
from poise.engine.launch import prepare_ray
prepare_ray(sys.argv[1])
import ray
from poise.engine.ray.worker_group import cluster
with cluster(sys.argv[1], []):
    print("CPU", int(ray.cluster_resources()["CPU"]))
"""


def check_that_it_is_closed_to_others(made: cluster.Cluster, home: Path) -> None:
    """Files for their owner alone, and no port that another machine reaches."""
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(made.scratch).stat().st_mode) == 0o700
    listening = [
        connection.laddr.ip
        for process in cluster._processes(made)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def check_that_strangers_are_turned_away(run: Run, stranger: Path, made: cluster.Cluster) -> None:
    """One line, in about the time that Python takes to start: Ray by itself asks again for 20 s."""
    stranger.mkdir()
    for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}):
        started = time.monotonic()
        refused = run("poise", "run", "tiny.yaml", "--address", made.address, HOME=str(stranger), **token)
        assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert "asks for a token" in refused.stderr
        assert time.monotonic() - started < 18
    refused = run("poise", "status", "any", "--address", made.dashboard, HOME=str(stranger))
    assert (refused.returncode, "asks for a token" in refused.stderr) == (2, True), refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_head_that_is_started_by_hand_asks_for_the_token_that_was_made_first(run, tmp_path):
    """As the guide has it, with other ports and a folder of its own."""
    file = run("poise", "cluster", "token").stdout.strip()
    assert file == str(tmp_path / "home" / ".ray" / "auth_token")
    port = free_port()
    options = [
        f"--port={port}",
        "--include-dashboard=false",
        f"--ray-client-server-port={free_port()}",
        "--num-cpus=0",
        "--block",
    ]
    scratch = tempfile.mkdtemp(prefix="poise-test-", dir="/tmp")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--temp-dir={scratch}", *options]
    head = subprocess.Popen(
        command, env={**kept, "HOME": str(tmp_path / "home")}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:  # the head is ended as soon as its first process answers
        answers = run(sys.executable, "-c", ASK, f"127.0.0.1:{port}", file)
        assert answers.stdout == "False True True\n", answers.stderr
    finally:
        for process in (*psutil.Process(head.pid).children(recursive=True), head):
            process.kill()
        head.wait()
        shutil.rmtree(scratch, ignore_errors=True)


ASK = """\
import os, sys, time
from poise.engine.ray.auth import refuses_token
address, port = sys.argv[1], int(sys.argv[1].rpartition(":")[2])
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=open(sys.argv[2]).read())
import socket
for _ in range(600):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        break
    except OSError:
        time.sleep(0.1)
with_it = refuses_token(address)
os.environ["RAY_AUTH_TOKEN"] = "b" * 64
with_another = refuses_token(address)
os.environ["RAY_AUTH_MODE"] = "disabled"
print(with_it, with_another, refuses_token(address))
"""


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

    (home / "work" / "tiny.yaml").write_text(SPEC.format(store=tmp_path / "runs"))
    check_that_it_is_closed_to_others(made, home)
    check_that_strangers_are_turned_away(run, tmp_path / "stranger", made)
    joined = run(sys.executable, "-c", JOIN, made.address)
    assert joined.stdout == "CPU 3\n", joined.stderr

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
    assert Path(made.endpoints).is_file()

    processes = cluster._processes(made)
    assert len(processes) > 5
    assert run("poise", "cluster", "down").stdout == "down\n"
    assert not psutil.wait_procs(processes, timeout=10)[1]
    assert not Path(made.scratch).exists()
    assert run("poise", "cluster", "down").stdout == "nothing was up\n"
