"""Every test of the store that asks for `url` or `storage` runs on a folder and on S3."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from poise.store.s3 import S3Storage
from poise.store.storage import Storage, open_storage


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
