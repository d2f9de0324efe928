"""A scheduler's signals, sent to the real command line: no step is lost, the lease is free, the exit code asks to be
queued again, and the run ends in the same bits.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from poise.store.lease import Lease

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REQUEUE = 75
LONG = 2000


def test_each_signal_to_a_local_run(desk, alone, assert_same, ended_in_good_order, tmp_path):
    store = str(tmp_path / "runs")
    lasts = [0]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        job = desk.start("stopped", store, "local", workers=1)
        job.until(lambda job=job: any(commit.step > lasts[-1] for commit in job.run.checkpoints.commits()))
        os.kill(job.process.pid, number)
        assert job.wait() == REQUEUE, job.text()
        assert f"after {number.name}; the same command goes on" in job.text()
        assert "Traceback" not in job.text()
        lasts.append(ended_in_good_order(job.run, lasts[-1]))
    run = desk.finish("stopped", store, "local", workers=1)
    starts = [event["step"] for event in run.events() if event["event"] == "start"]
    assert starts == lasts
    assert_same(run, alone)


def test_where_no_step_is_under_way_a_signal_ends_the_run_at_once(desk, tmp_path):
    """While the model is made and the data are read there is nothing to commit."""
    store = str(Path(tmp_path) / "runs")
    job = desk.start("early", store, "local", workers=1, steps=LONG)
    job.until(lambda: Lease.is_held(job.run.storage, "early"))
    os.kill(job.process.pid, signal.SIGUSR1)
    assert job.wait(60) == REQUEUE, job.text()
    assert not Lease.is_held(job.run.storage, "early")
