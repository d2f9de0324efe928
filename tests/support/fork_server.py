"""Starts Python programs by fork from a process that has torch and Poise imported: in milliseconds, not in seconds.

A program that is started here is a process like any other. It has its own arguments, environment, folder, output and,
if asked for, session; its signals are at their defaults; and it ends as a Python process ends. Only its imports are
done. The server never starts a thread, so that nothing is lost by forking.

Started as a program, this file is the server. Each connection to its socket is one request, a message of JSON:
{"start": ...} with two file descriptors for stdout and stderr is answered by a process id, {"poll": pid} by the exit
code, or null while the process runs. The server ends when its standard input is closed, as it is by the end of the
process that started it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["ForkServer", "ForkedProcess"]

_PRELOADED = (
    "torch",
    "torch._dynamo",  # every optimizer imports it
    "sklearn.datasets",
    "boto3",
    "matplotlib.figure",
    "poise.cli",
    "poise.kinds.bounds_report.run",
    "poise.kinds.check",
    "poise.kinds.finetune_sft.run",
    "poise.kinds.robust_evaluate.run",
    "poise.kinds.robust_train.run",
    "poise.report.page",
)
"""Neither Ray nor poise.engine, which read and set the environment when they are imported."""

_MOST_BYTES = 1 << 18


class ForkedProcess:
    """One program, with the methods of subprocess.Popen that tests use."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the process has ended. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A server in a process of its own, for as long as the block runs; `folder` receives its socket."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "fork-server"

    def __enter__(self) -> ForkServer:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # read when torch is imported
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # the allocator of pyarrow starts a thread otherwise
        }
        command = [sys.executable, __file__, str(self.address)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the fork server did not start"
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # unloading torch in good order takes a second
        self._process.wait()

    def start(
        self,
        arguments: Sequence[str],
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        new_session: bool = False,
    ) -> ForkedProcess:
        """Start `python *arguments`, which begin with -m or -c. Without files for its output this is discarded."""
        start = {
            "arguments": list(arguments),
            "cwd": str(Path(cwd or ".").resolve()),
            "env": dict(os.environ if env is None else env),
            "new_session": new_session,
        }
        with open(os.devnull, "wb") as null:
            descriptors = [(stream or null).fileno() for stream in (stdout, stderr)]
            return ForkedProcess(self, self.ask({"start": start}, descriptors))

    def run(
        self, arguments: Sequence[str], *, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `python *arguments` to its end, and return its exit code and what it printed."""
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            code = self.start(arguments, stdout, stderr, cwd=cwd, env=env).wait()
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(list(arguments), code, stdout.read(), stderr.read())

    def start_ranks(
        self,
        arguments: Sequence[str],
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        *,
        count: int = 2,
        cwd: str | Path | None = None,
    ) -> list[ForkedProcess]:
        """Start `python *arguments` once for each rank, with the environment variables that torchrun sets."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = []
        for rank in range(count):
            variables = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
            environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            processes.append(self.start(arguments, stdout, stderr, cwd=cwd, env=environment, new_session=True))
        return processes

    def run_ranks(self, arguments: Sequence[str], *, count: int = 2) -> subprocess.CompletedProcess[str]:
        """Run `python *arguments` as `count` ranks to their end.

        Returns the first exit code that is not 0, and what all of them printed.
        """
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            codes = [process.wait() for process in self.start_ranks(arguments, stdout, stderr, count=count)]
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(
                list(arguments), next(filter(None, codes), 0), stdout.read(), stderr.read()
            )

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> Any:
        """The answer of the server to one request."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(self.address))
            socket.send_fds(connection, [json.dumps(request).encode()], descriptors)
            return json.loads(connection.recv(_MOST_BYTES))


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """Answer requests. Returns None once standard input is closed and, in a new process, what to run there."""
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:
            return None
        connection, _ = listener.accept()
        with connection:
            data, descriptors, _, _ = socket.recv_fds(connection, _MOST_BYTES, 2)
            request = json.loads(data)
            if "poll" in request:
                ended, status = os.waitpid(request["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if ended else None
            else:
                answer = os.fork()
                if answer == 0:
                    break
                for descriptor in descriptors:
                    os.close(descriptor)
            connection.send(json.dumps(answer).encode())
    listener.close()
    _become(request["start"], descriptors)
    return dict(request["start"])


def _become(start: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Give this process, which was just forked, the session, streams, folder and environment that were asked for."""
    if start["new_session"]:
        os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((null, *descriptors)):
        os.dup2(source, target)
    for source in (null, *descriptors):
        os.close(source)
    os.chdir(start["cwd"])
    os.environ.clear()
    os.environ.update(start["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _execute(start: Mapping[str, Any], path: Sequence[str]) -> None:
    """Run `-m module` or `-c code` as Python's command line does; `path` is sys.path without what the start adds."""
    option, program, *arguments = start["arguments"]
    assert option in ("-m", "-c")
    added = [entry for entry in start["env"].get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [start["cwd"] if option == "-m" else "", *added, *path]
    importlib.invalidate_caches()
    if option == "-m":
        sys.argv[:] = [program, *arguments]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = ["-c", *arguments]
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(program, "<string>", "exec"), vars(module))


def _main() -> None:
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [entry for entry in sys.path[1:] if entry not in own]
    for name in _PRELOADED:
        importlib.import_module(name)
    assert not {"ray", "poise.engine"} & sys.modules.keys()
    tasks = len(os.listdir("/proc/self/task"))
    assert threading.active_count() == tasks == 1, "an import has started a thread"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal of the tests is not for the server
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(sys.argv[1])
        listener.listen(64)
        print("ready", flush=True)
        start = _serve(listener)
    if start is not None:
        _execute(start, path)


if __name__ == "__main__":
    _main()
