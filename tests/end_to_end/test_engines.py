"""One loop on every engine: the same bits alone, under torchrun and in a Ray worker group; and as a Ray job."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest

from poise.store.runs import open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_pipeline_prints_one_table_and_a_page(tmp_path, poise):
    done = poise(
        "run", "jobs/digits.yaml", "--engine", "local", "--set", f"store={tmp_path}/runs", "--set",
        "workers.count=1", "--set", "common.digits.train.epochs=2", "--set", "common.digits.evaluate.num_examples=40",
        COLUMNS="100",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("digits-at", "digits-adt", "clean", "union"):
        assert word in done.stdout
    page = Path(done.stdout.split("page: ")[1].strip())
    assert "digits-adt" in page.read_text()
    verified = poise("runs", "verify", f"{tmp_path}/runs/digits-adt")
    assert "are valid" in verified.stdout, verified.stdout
    listed = poise("runs", "list", f"{tmp_path}/runs", COLUMNS="200").stdout
    assert listed.count("finished") == 3


def test_a_run_goes_on_with_fewer_workers_than_it_began_with(desk, tmp_path, fork_server):
    store = str(tmp_path / "runs")
    spec = desk.spec("shrunk", store, workers=2)
    arguments = ["-m", "poise", "run", str(spec), "--engine", "local"]
    ranks = fork_server.start_ranks(arguments)
    run = open_run(store, "shrunk")
    deadline = time.monotonic() + 60
    while not run.checkpoints.commits() and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()
    before = [commit.step for commit in run.checkpoints.commits()]
    assert before
    assert before[-1] < 60
    desk.finish("shrunk", store, "local", workers=1)
    starts = [(event["step"], event["workers"]) for event in run.events() if event["event"] == "start"]
    assert starts == [(0, 2), (before[-1], 1)]
    assert [commit.step for commit in run.checkpoints.commits()] == [10, 20, 30, 40, 50, 60]


def test_metrics_of_the_driver_are_served(desk, free_port, tmp_path, fork_server):
    port = free_port
    spec = desk.spec("watched", str(tmp_path / "runs"), workers=1, steps=4000)
    arguments = ["-m", "poise", "run", str(spec), "--engine", "local", "--metrics-port", str(port)]
    process = fork_server.start(arguments)
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
