"""Every test of the store that asks for `url` or `storage` runs on a folder and on S3."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from poise.store.s3 import S3Storage
from poise.store.storage import Entry, Storage, open_storage


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return str(request.getfixturevalue("s3_store"))


@pytest.fixture(scope="session")
def clients() -> dict[str, object]:
    """The S3 client of the first test, for all: making one takes longer than most of the tests."""
    return {}


@pytest.fixture
def storage(url: str, clients: dict[str, object]) -> Storage:
    storage = open_storage(url)
    if isinstance(storage, S3Storage):
        if not clients:
            clients["s3"] = storage._client
        storage._client = clients["s3"]
    return storage


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow each other at once: for tests of their number, not of their pace."""
    monkeypatch.setattr("poise.store.s3_retries.RetryPolicy._draw", lambda self, longest: 0.0)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


class Mortal(Storage):
    """A storage whose user is killed after `life` changes: the next one does not happen."""

    class Killed(BaseException):
        """What nothing catches, as SIGKILL is not caught."""

    def __init__(self, storage: Storage, life: int) -> None:
        self.url = storage.url
        self.storage = storage
        self.life = life

    def _change(self, act: Callable[..., object], *arguments: object) -> object:
        if self.life == 0:
            raise self.Killed
        self.life -= 1
        return act(*arguments)

    def write(self, key: str, data: bytes) -> None:
        self._change(self.storage.write, key, data)

    def create(self, key: str, data: bytes) -> bool:
        return bool(self._change(self.storage.create, key, data))

    def compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        return bool(self._change(self.storage.compare_and_swap, key, data, expected))

    def append(self, key: str, data: bytes) -> bool:
        return bool(self._change(self.storage.append, key, data))

    def upload(self, path: Path, key: str) -> None:
        self._change(self.storage.upload, path, key)

    def delete(self, keys: Sequence[str]) -> None:
        for key in reversed(keys):  # a store may stop in the middle of a batch, which has no order
            self._change(self.storage.delete, [key])

    def move(self, key: str, to: str) -> None:
        self._change(self.storage.move, key, to)

    def read(self, key: str) -> bytes:
        return self.storage.read(key)

    def list(self, prefix: str = "") -> list[Entry]:
        return self.storage.list(prefix)

    def folders(self) -> Sequence[str]:
        return self.storage.folders()

    def download(self, key: str, path: Path) -> None:
        self.storage.download(key, path)

    def sweep(self, older_than_s: float, prefix: str = "") -> Sequence[str]:
        return self.storage.sweep(older_than_s, prefix)

    def check_exclusion(self) -> None:
        self.storage.check_exclusion()


@pytest.fixture
def mortal() -> type[Mortal]:
    return Mortal
