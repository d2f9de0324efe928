"""A scheduler's signals, sent to the real command line: no step is lost, the lease is free, the exit code asks to be
queued again, and the run ends in the same bits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from poise.store.lease import Lease
from poise.store.runs import Run, open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REQUEUE = 75
LONG = 2000


def assert_ended_in_good_order(run: Run, committed_before: int) -> int:
    """The lease is free, the record says what happened, and a step was committed that no cadence asked for."""
    assert not Lease.is_held(run.storage, run.name)
    assert run.events()[-1]["event"] == "preempted"
    assert run.summary().status == "interrupted"
    assert run.verify() == []
    last = run.checkpoints.commits()[-1].step
    assert last >= committed_before
    return last


def test_each_signal_to_a_local_run(desk, alone, assert_same, tmp_path):
    store = str(tmp_path / "runs")
    lasts = [0]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        job = desk.start("stopped", store, "local", workers=1)
        job.until(lambda job=job: any(commit.step > lasts[-1] for commit in job.run.checkpoints.commits()))
        os.kill(job.process.pid, number)
        assert job.wait() == REQUEUE, job.text()
        assert f"after {number.name}; the same command goes on" in job.text()
        assert "Traceback" not in job.text()
        lasts.append(assert_ended_in_good_order(job.run, lasts[-1]))
    run = desk.finish("stopped", store, "local", workers=1)
    starts = [event["step"] for event in run.events() if event["event"] == "start"]
    assert starts == lasts
    assert_same(run, alone)


def test_a_signal_to_torchrun(desk, uninterrupted, assert_same, tmp_path):
    spec = desk.spec("torchrun", str(tmp_path / "runs"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "poise", "run", str(spec), "--engine", "local"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = open_run(str(tmp_path / "runs"), "torchrun")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while not run.checkpoints.commits():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        ranks = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) != 0
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    assert_ended_in_good_order(run, 10)
    assert "torchrun: stopped and committed at step" in (tmp_path / "log").read_text()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(run, uninterrupted)


def test_a_signal_to_a_driver_and_to_a_worker_on_ray(head, desk, uninterrupted, assert_same, tmp_path):
    store = str(tmp_path / "runs")
    job = desk.start("stopped", store, address=head.address)
    job.until_committed(1)
    sent = time.time()
    os.kill(job.worker_pids()[1], signal.SIGTERM)
    job.until(lambda: [event["event"] for event in job.run.events()].count("start") == 2)
    commit, start = [event for event in job.run.events() if event["event"] in ("start", "commit")][-2:]
    assert (commit["event"], start["event"]) == ("commit", "start")
    assert commit["step"] == start["step"]
    assert commit.get("provisional") or (commit["step"] % 10 == 0 and commit["time"] > sent), "the worker lost steps"
    job.until_committed(3)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == REQUEUE, job.text()
    assert "stopped and committed at step" in job.text()
    assert "Traceback" not in job.text()
    last = assert_ended_in_good_order(job.run, 10)
    run = desk.finish("stopped", store, address=head.address)
    assert [event["step"] for event in run.events() if event["event"] == "start"][-1] == last
    assert_same(run, uninterrupted)


def test_where_no_step_is_under_way_a_signal_ends_the_run_at_once(desk, tmp_path):
    """While the model is made and the data are read there is nothing to commit."""
    store = str(Path(tmp_path) / "runs")
    job = desk.start("early", store, "local", workers=1, steps=LONG)
    job.until(lambda: Lease.is_held(job.run.storage, "early"))
    os.kill(job.process.pid, signal.SIGUSR1)
    assert job.wait(60) == REQUEUE, job.text()
    assert not Lease.is_held(job.run.storage, "early")
