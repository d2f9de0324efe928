"""A full disk of temporary files ends a training with what to do, and nothing that was committed is lost."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from poise.errors import StoreError


@pytest.fixture
def full_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 64 KiB as TMPDIR."""
    place = tmp_path / "tmpdir"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_tmpdir_is_named_and_the_run_goes_on_when_there_is_space(bench, full_tmpdir, tmp_path, monkeypatch):
    whole = bench.fit("whole")

    def fill(batch: int) -> None:
        if batch == 7:
            (full_tmpdir / "other").write_bytes(bytes(60 << 10))

    with pytest.raises(StoreError, match=r"tmpdir: no space left .* set TMPDIR to a folder on a disk with room"):
        bench.fit("full", fill)
    assert bench.steps("full") == [3, 4, 6]
    (full_tmpdir / "other").unlink()
    assert bench.fit("full") == whole
    bench.assert_equal("full", "whole", full_tmpdir.parent)


def test_no_usable_tmpdir_is_named(bench, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    with pytest.raises(StoreError, match="set TMPDIR to a folder"):
        bench.fit("nowhere")
