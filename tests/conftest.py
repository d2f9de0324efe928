"""What several rooms' tests need: an S3 service on loopback, one that fails, and the shared data sets."""

from __future__ import annotations

import http.client
import logging
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

os.environ["RAY_AUTH_MODE"] = "disabled"  # before any test imports Ray, which reads it once for the process

_LONGEST = ("test_ray.py", "test_selfplay_on_ray.py", "test_calibration_on_ray.py", "test_sweep.py", "test_pool.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest go first, so that neither of two processes is left alone with one at the end."""
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data sets: POISE_SHARED_DATA, or ../shared/data beside the repository."""
    path = Path(os.environ.get("POISE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("no shared data: set POISE_SHARED_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 service in a thread of this process; nothing is set in the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def new_bucket(s3_server: str) -> Callable[[], str]:
    """Makes a bucket and returns its name."""
    import boto3

    admin = boto3.session.Session("testing", "not-a-secret", region_name="us-east-1").client(
        "s3", endpoint_url=s3_server
    )

    def make() -> str:
        name = f"poise-{uuid.uuid4().hex[:12]}"
        admin.create_bucket(Bucket=name)
        return name

    return make


@pytest.fixture(scope="session")
def s3_settings(s3_server: str) -> dict[str, str]:
    """The environment of a process that may use the S3 service."""
    return {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def s3_store(s3_settings: dict[str, str], new_bucket: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store in a bucket of its own; this process and its children may use it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_settings.items():
        monkeypatch.setenv(name, value)
    return f"s3://{new_bucket()}/tests/runs"


@pytest.fixture
def flaky_s3(s3_store: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3_store` behind a proxy that answers 503 to one request in three, to half of these after it was served."""
    draw = random.Random(0)
    with _failing_proxy(s3_server, lambda: draw.choices(("serve", "drop", "lose"), (4, 1, 1))[0]) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield s3_store


@pytest.fixture
def dead_s3(s3_store: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3_store` behind a proxy that answers 503 to everything."""
    with _failing_proxy(s3_server, lambda: "drop") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield s3_store


@contextmanager
def _failing_proxy(backend: str, decide: Callable[[], str]) -> Iterator[str]:
    """A forwarding proxy; `decide()` says of each request: serve it, drop it, or serve it and lose the answer."""
    target = urlsplit(backend).netloc
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self._body()
            with lock:
                fate = decide()
            status, headers, answer = self._ask(body) if fate != "drop" else (503, [], b"")
            if fate != "serve":
                status, headers, answer = 503, [], b""
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length") if self.command == "HEAD" else len(answer)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            skipped = ("transfer-encoding", "content-length", "expect")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
            connection = http.client.HTTPConnection(target, timeout=30)
            try:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()
