"""A program that the fork server starts is what a new interpreter would make of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

STATE = """\
import json, os, signal, sys, threading
signals = {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")}
print(json.dumps({
    "arguments": sys.argv, "first": sys.path[0], "main": __name__, "folder": os.getcwd(), "input": sys.stdin.read(),
    "variables": sorted(os.environ.items()), "signals": signals, "blocked": len(signal.pthread_sigmask(0, [])),
    "threads": len(os.listdir("/proc/self/task")), "own": os.getsid(0) == os.getpid(), "added": "/added" in sys.path,
    "descriptors": sorted(fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")),
}))
"""


@pytest.mark.parametrize("own", [True, False])
def test_it_has_the_arguments_folder_environment_signals_and_descriptors_of_a_new_interpreter(
    fork_server, tmp_path, own
):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that this one starts inherits an ignored one
    environment = {"PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8", "PYTHONPATH": "/added"}
    arguments = ["-c", STATE, "one", "--two"]
    with (tmp_path / "forked").open("wb") as output:
        forked = fork_server.start(arguments, output, cwd=tmp_path, env=environment, new_session=own)
        assert forked.wait(60) == 0
    fresh = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, check=True,
        stdin=subprocess.DEVNULL, start_new_session=own,
    )  # fmt: skip
    assert json.loads((tmp_path / "forked").read_text()) == json.loads(fresh.stdout)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("raise SystemExit(75)", 75),
        ("raise SystemExit('said')", 1),
        ("raise ValueError('said')", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import atexit; atexit.register(print, 'said'); raise SystemExit(3)", 3),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('said'))).start()", 0),
    ],
)
def test_it_ends_as_a_python_process_does(fork_server, code, expected):
    done = fork_server.run(["-c", code])
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == fresh.returncode == expected
    assert done.stdout == fresh.stdout
    assert done.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_the_command_line_says_the_same(fork_server, tmp_path):
    for arguments in (["check", "nowhere.yaml"], ["--help"], ["run"]):
        done = fork_server.run(["-m", "poise", *arguments], cwd=tmp_path)
        fresh = subprocess.run(
            [sys.executable, "-m", "poise", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)


def test_a_signal_ends_it_and_others_go_on(fork_server):
    first, second = (fork_server.start(["-c", "import time; time.sleep(60)"]) for _ in range(2))
    assert first.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(10) == -signal.SIGTERM
    assert not psutil.pid_exists(first.pid)
    assert second.poll() is None
    second.kill()
    assert second.wait(10) == -signal.SIGKILL
