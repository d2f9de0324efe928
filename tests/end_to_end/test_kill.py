"""SIGKILL for a worker or for the driver, on a folder and on S3: the run ends in the same bits as one left in peace."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("ray")]


def store_of(request: pytest.FixtureRequest, kind: str) -> str:
    return str(
        request.getfixturevalue("tmp_path") / "runs" if kind == "folder" else request.getfixturevalue("s3_store")
    )


def wait_for_a_random_step(job, draw: random.Random) -> None:
    """Some commits, then some part of the time between two."""
    job.until_committed(draw.randint(1, 4))
    time.sleep(draw.uniform(0, 0.4))
    assert job.process.poll() is None, "the run was over before it could be killed"


def assert_nothing_was_lost_or_repeated(run) -> None:
    """Each start goes on from the newest commit before it, and no step was committed twice."""
    committed = 0
    for event in run.events():
        if event["event"] == "start":
            assert event["step"] in (committed, committed + 10)  # + 10: killed between the commit and its event
            committed = event["step"]
        elif event["event"] == "commit":
            assert event["step"] == committed + 10
            committed = event["step"]
    assert committed == 60
    assert "damaged" not in {event["event"] for event in run.events()}


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_killed_worker(kind, request, head, desk, uninterrupted, assert_same):
    draw = random.Random(f"worker {kind}")
    job = desk.start("killed", store_of(request, kind), address=head.address)
    wait_for_a_random_step(job, draw)
    os.kill(draw.choice(job.worker_pids()), signal.SIGKILL)
    assert job.wait() == 0, job.text()
    assert [event["attempt"] for event in job.run.events() if event["event"] == "start"] == [0, 1]
    assert "a worker died; attempt 2 goes on from the last commit" in job.text()
    assert_nothing_was_lost_or_repeated(job.run)
    assert_same(job.run, uninterrupted)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_killed_driver(kind, request, desk, uninterrupted, assert_same):
    """On a folder its private cluster dies with it; on S3 the cluster lives on, and so do its workers for a while."""
    draw = random.Random(f"driver {kind}")
    store, address = store_of(request, kind), None if kind == "folder" else request.getfixturevalue("head").address
    job = desk.start("killed", store, address=address)
    wait_for_a_random_step(job, draw)
    job.kill()
    assert job.run.manifest().status == "running"
    desk.finish("killed", store, address=address)
    assert len([event for event in job.run.events() if event["event"] == "start"]) == 2
    assert_nothing_was_lost_or_repeated(job.run)
    assert_same(job.run, uninterrupted)
