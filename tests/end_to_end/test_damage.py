"""What goes wrong outside the program: a full disk, two drivers for one name, an S3 service that fails."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest

from poise.engine.launch import launch
from poise.kinds import KINDS
from poise.observe.progress import Display
from poise.observe.sinks import NullSink
from poise.spec import load
from poise.store.runs import Run, open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 200 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_space(small_disk, desk, alone, assert_same):
    job = desk.start("full", str(small_disk / "runs"), "local", workers=1)
    assert job.wait() == 1
    assert "no space left" in job.text()
    assert "Traceback" not in job.text()
    committed = [commit.step for commit in job.run.checkpoints.commits()]
    assert committed, "the disk was too small for a single checkpoint"
    assert committed != [10, 20, 30, 40, 50, 60], "the disk was not full"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run = desk.finish("full", str(small_disk / "runs"), "local", workers=1)
    assert [event["step"] for event in run.events() if event["event"] == "start"] == [0, committed[-1]]
    assert_same(run, alone)


def test_of_two_drivers_for_one_name_one_runs_and_the_other_says_who(desk, tmp_path):
    store = str(tmp_path / "runs")
    first = desk.start("one", store, "local", workers=1, steps=2000)
    first.until_committed(1)
    second = desk.start("one", store, "local", workers=1, steps=2000)
    assert second.wait() == 3
    assert f"held by process {first.process.pid}" in second.text()
    assert "Traceback" not in second.text()
    before = len(first.run.checkpoints.commits())
    first.until_committed(before + 1)  # the holder was not disturbed


def test_a_run_of_the_same_name_with_another_spec_is_refused_with_the_difference(desk, alone):
    before = alone.manifest()
    job = desk.start(alone.name, str(Path(alone.url).parent), "local", workers=1, steps=20)
    assert job.wait() == 2
    assert "-  steps: 60" in job.text()
    assert "+  steps: 20" in job.text()
    assert alone.manifest() == before


def finish_here(spec: Path) -> Run:
    """Run a spec to its end in this process."""
    loaded = load(spec, KINDS)
    launch(loaded, "local", None, Display(io.StringIO()), NullSink())
    return open_run(loaded.store, loaded.name)


def test_on_an_s3_that_fails_one_request_in_three_the_run_is_the_same_and_holds_no_secret(
    flaky_s3, desk, assert_same, tmp_path, monkeypatch
):
    """The pauses between attempts, of which tests/store/test_s3.py tells, are a hundredth as long as they would be."""
    monkeypatch.setattr("poise.store.s3_retries.RetryPolicy._draw", lambda self, longest: longest / 100)
    whole = finish_here(desk.spec("whole", str(tmp_path / "runs"), workers=1, steps=20))
    run = finish_here(desk.spec("flaky", flaky_s3, workers=1, steps=20))
    assert_same(run, whole)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    kept = [run.read(name) for name in run.files()]
    assert kept
    assert not [blob for blob in kept if secret in blob]


def test_an_s3_that_does_not_answer_is_named(s3_store, desk, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    job = desk.start("lost", s3_store, "local", workers=1)
    assert job.wait() == 1
    assert "http://127.0.0.1:9 cannot be reached" in job.text()
    assert "Traceback" not in job.text()
