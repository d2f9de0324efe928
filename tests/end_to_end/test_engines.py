"""One loop on every engine: the same bits alone, under torchrun and in a Ray gang; and as a Ray job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from poise.observe.environment import environment
from poise.store.runs import open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
with_ray = pytest.mark.xdist_group("ray")  # one process has the cluster; the other runs all else meanwhile

ROOT = Path(__file__).parents[2]


def poise(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "poise", *arguments],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@with_ray
def test_two_processes_under_torchrun_are_two_ray_workers(desk, uninterrupted, assert_same, tmp_path):
    spec = desk.spec("torchrun", str(tmp_path / "runs"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "poise", "run", str(spec), "--engine", "local"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(open_run(str(tmp_path / "runs"), "torchrun"), uninterrupted)


@with_ray
def test_a_finished_run_is_left_as_it_is(uninterrupted, tmp_path):
    store = str(Path(uninterrupted.url).parent)
    before = uninterrupted.manifest()
    spec = tmp_path / "again.yaml"
    spec.write_bytes(uninterrupted.read("spec.yaml"))
    started = time.monotonic()
    done = poise("run", str(spec))
    assert done.returncode == 0, done.stderr
    assert "union" in done.stdout
    assert time.monotonic() - started < 60
    assert open_run(store, "whole").manifest() == before


def test_the_quickstart_prints_one_table_and_a_page(tmp_path):
    done = poise(
        "run", "jobs/quickstart.yaml", "--engine", "local", "--set", f"store={tmp_path}/runs", "--set",
        "workers.count=1", "--set", "common.train.epochs=2", "--set", "common.evaluate.examples=40", COLUMNS="100",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("quickstart-at", "quickstart-adt", "clean", "union"):
        assert word in done.stdout
    page = Path(done.stdout.split("page: ")[1].strip())
    assert "quickstart-adt" in page.read_text()
    verified = poise("runs", "verify", f"{tmp_path}/runs/quickstart-adt")
    assert "are sound" in verified.stdout, verified.stdout
    listed = poise("runs", "list", f"{tmp_path}/runs", COLUMNS="200").stdout
    assert listed.count("finished") == 3


@with_ray
def test_a_spec_is_sent_as_a_job_followed_listed_and_stopped(head, desk, tmp_path):
    store = str(tmp_path / "runs")
    done = poise("submit", str(desk.spec("sent", store, workers=1, steps=20)), "--address", head.dashboard)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "poise-sent: SUCCEEDED" in done.stdout
    sent = open_run(store, "sent")
    assert json.loads(sent.read("artifacts/summary.json"))["step"] == 20
    assert json.loads(sent.read("environment.json"))["git"] == environment()["git"]
    assert "poise-sent: SUCCEEDED" in poise("status", "poise-sent", "--address", head.dashboard).stdout
    assert "union" in poise("logs", "poise-sent", "--address", head.dashboard).stdout

    long = desk.spec("long", store, workers=1, steps=100_000)
    assert poise("submit", str(long), "--address", head.dashboard, "--detach").returncode == 0
    twice = poise("submit", str(long), "--address", head.dashboard)
    assert twice.returncode == 2
    assert "poise stop poise-long" in twice.stderr
    stopped = poise("stop", "poise-long", "--address", head.dashboard)
    assert stopped.returncode == 0, stopped.stderr


@with_ray
def test_a_users_mistake_that_only_a_worker_can_see_ends_the_run_without_a_traceback(head, desk, tmp_path):
    spec = desk.spec("mistaken", str(tmp_path / "runs"), workers=1)
    nowhere = ["--set", "data.name=mnist", "--set", f"data.root={tmp_path}/nowhere"]
    done = poise("run", str(spec), "--address", head.address, *nowhere)
    assert done.returncode == 2, done.stderr
    assert "nowhere has no train-images-idx3-ubyte" in done.stderr
    assert "Traceback" not in done.stderr
    run = open_run(str(tmp_path / "runs"), "mistaken")
    assert (run.manifest().status, "nowhere" in run.manifest().error) == ("failed", True)


def test_a_run_goes_on_with_fewer_workers_than_it_began_with(desk, tmp_path):
    store = str(tmp_path / "runs")
    spec = desk.spec("shrunk", store, workers=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, "-m", "poise", "run", str(spec), "--engine", "local"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    run = open_run(store, "shrunk")
    deadline = time.monotonic() + 60
    while not run.checkpoints.commits() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = [commit.step for commit in run.checkpoints.commits()]
    assert before
    assert before[-1] < 60
    desk.finish("shrunk", store, "local", workers=1)
    starts = [(event["step"], event["workers"]) for event in run.events() if event["event"] == "start"]
    assert starts == [(0, 2), (before[-1], 1)]
    assert [commit.step for commit in run.checkpoints.commits()] == [10, 20, 30, 40, 50, 60]


@with_ray
def test_mistakes_about_jobs_are_answered_without_a_traceback(head, desk, tmp_path):
    unknown = poise("status", "poise-none", "--address", head.dashboard)
    assert (unknown.returncode, "knows no job poise-none" in unknown.stderr) == (2, True)
    nobody = poise("status", "poise-none", "--address", "http://127.0.0.1:9")
    assert (nobody.returncode, "no Ray cluster answers" in nobody.stderr) == (2, True)
    assert "Traceback" not in unknown.stderr + nobody.stderr


def test_metrics_of_the_driver_are_served(desk, free_port, tmp_path):
    port = free_port
    spec = desk.spec("watched", str(tmp_path / "runs"), workers=1, steps=4000)
    command = [sys.executable, "-m", "poise", "run", str(spec), "--engine", "local", "--metrics-port", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        deadline, text = time.monotonic() + 60, ""
        while 'poise_committed_step{run="watched"}' not in text and time.monotonic() < deadline:
            time.sleep(0.3)
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                continue
        for name in ("poise_loss", "poise_commits_total", "poise_steps_total", "poise_phase_seconds_bucket"):
            assert f"{name}{{" in text, text
    finally:
        process.kill()
        process.wait()
