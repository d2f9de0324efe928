"""Everything that needs a Ray cluster: SIGKILL for a worker or a driver, engines compared, jobs.

One file, so that tests that are run in parallel share one cluster. A run that something happened to ends in the same
bits as one left in peace.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from poise.observe.environment import environment
from poise.store.lease import Lease
from poise.store.runs import open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def attempts(run) -> list[int]:
    return [event["attempt"] for event in run.events() if event["event"] == "start"]


def wait_for_a_random_step(job, draw: random.Random) -> None:
    """A commit or two more, then some part of the time between two."""
    job.until_committed(len(job.run.checkpoints.commits()) + draw.randint(1, 2))
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
    damaged = [event["what"] for event in run.events() if event["event"] == "damaged"]
    assert all("the upload was not finished" in what for what in damaged)  # killed while it committed


def test_a_killed_worker_and_a_killed_driver(head, s3_store, desk, uninterrupted, assert_same):
    """On S3, on a cluster whose workers outlive their driver for a while; those below keep their runs in a folder."""
    draw = random.Random("s3")
    job = desk.start("killed", s3_store, address=head.address)
    wait_for_a_random_step(job, draw)
    os.kill(draw.choice(job.worker_pids()), signal.SIGKILL)
    job.until(lambda: attempts(job.run) == [0, 1])
    wait_for_a_random_step(job, draw)
    job.kill()
    assert job.run.manifest().status == "running"
    assert "a worker died; attempt 2 goes on from the last commit" in job.text()
    desk.finish("killed", s3_store, address=head.address)
    assert attempts(job.run) == [0, 1, 0]
    assert_nothing_was_lost_or_repeated(job.run)
    assert_same(job.run, uninterrupted)


def test_two_processes_under_torchrun_that_a_signal_stops_are_two_ray_workers(
    desk, fork_server, uninterrupted, assert_same, ended_in_good_order, tmp_path
):
    spec = desk.spec("torchrun", str(tmp_path / "runs"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "poise", "run", str(spec), "--engine", "local"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = open_run(str(tmp_path / "runs"), "torchrun")
    with (tmp_path / "log").open("w") as log:
        process = fork_server.start(command, log, log, env=environment)
        while not run.checkpoints.commits():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        ranks = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) != 0
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    ended_in_good_order(run, 10)
    assert "torchrun: stopped and committed at step" in (tmp_path / "log").read_text()
    done = fork_server.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    assert_same(run, uninterrupted)


def test_a_signal_to_a_driver_and_to_a_worker_on_ray(
    head, desk, uninterrupted, assert_same, ended_in_good_order, tmp_path
):
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
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 75, job.text()
    # workers that were still loading had no step to commit; test_a_signal_to_torchrun sends it during training
    assert re.search(r"stopped (and committed at step \d+|at the last commit after SIGTERM)", job.text()), job.text()
    assert "Traceback" not in job.text()
    last = ended_in_good_order(job.run, 10)
    run = desk.finish("stopped", store, address=head.address)
    assert [event["step"] for event in run.events() if event["event"] == "start"][-1] == last
    assert_same(run, uninterrupted)


def workers_of(head) -> list[psutil.Process]:
    family = psutil.Process(head.pid).children(recursive=True)
    return [process for process in family if process.name().startswith("ray::RayTrainWorker")]


@pytest.mark.parametrize("phase", ["starting", "training"])
def test_ctrl_c_ends_a_run_on_ray_at_once_and_says_what_goes_on(head, desk, tmp_path, phase):
    workers = {"starting": 1, "training": 2}[phase]
    job = desk.start("interrupted", str(tmp_path / "runs"), address=head.address, workers=workers)
    if phase == "starting":
        job.until(lambda: "starting 1 worker" in job.text())
    else:
        job.until_committed(1)
    os.kill(job.process.pid, signal.SIGINT)
    assert job.wait() == 130, job.text()
    assert "stopped; the same command goes on from the last commit" in job.text()
    assert "Traceback" not in job.text()
    assert not Lease.is_held(job.run.storage, job.run.name)
    deadline = time.monotonic() + 60
    while workers_of(head) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not workers_of(head), "the workers have outlived their driver"


def test_a_finished_run_is_left_as_it_is(uninterrupted, tmp_path, poise):
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


def test_a_run_asks_its_own_cluster_about_itself(head, uninterrupted):
    """Ray's actors find that of a head that was killed, wait for it and end the run 12 s late, unless they are told."""
    errors = "".join(file.read_text() for file in head.files.glob("session_latest/logs/worker-*.err"))
    assert "PlacementGroupCleaner" in "".join(file.read_text() for file in head.files.glob("session_latest/logs/*.out"))
    assert "Failed to stop PlacementGroupCleaner" not in errors


MODULE = """\
import torch
from torch import nn

def make():
    from helper_of_mine import WIDTH
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
"""


def test_a_spec_is_sent_as_a_job_followed_listed_and_stopped(head, desk, fork_server, tmp_path, poise):
    """With modules of the user: the run that a job starts joins the cluster too, and has nothing to send."""
    store = str(tmp_path / "runs")
    (tmp_path / "module_of_mine.py").write_text(MODULE)
    (tmp_path / "helper_of_mine.py").write_text("WIDTH = 16\n")
    spec = desk.spec("sent", store, workers=1, steps=20)
    spec.write_text(spec.read_text().replace("{name: cnn, width: 8}", '{function: "module_of_mine:make"}'))
    environ = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = fork_server.run(
        ["-m", "poise", "submit", str(spec), "--allow-code", "--address", head.dashboard], cwd=tmp_path, env=environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "poise-sent: SUCCEEDED" in done.stdout
    sent = open_run(store, "sent")
    assert json.loads(sent.read("result.json"))["step"] == 20
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


def test_a_users_mistake_that_only_a_worker_can_see_ends_the_run_without_a_traceback(head, desk, tmp_path, poise):
    spec = desk.spec("mistaken", str(tmp_path / "runs"), workers=1)
    nowhere = ["--set", "data.name=mnist", "--set", f"data.root={tmp_path}/nowhere"]
    done = poise("run", str(spec), "--address", head.address, *nowhere)
    assert done.returncode == 2, done.stderr
    assert "nowhere has no train-images-idx3-ubyte" in done.stderr
    assert "Traceback" not in done.stderr
    run = open_run(str(tmp_path / "runs"), "mistaken")
    assert (run.manifest().status, "nowhere" in run.manifest().error) == ("failed", True)


LATE = """\
import torch
from torch import nn

class Late(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(-1, 64) if len(x) > 5 else x.view(2, -1))

def late():
    torch.manual_seed(0)
    return Late(64, 10)
"""

EVALUATION = """\
kind: robust.evaluate
name: late
store: {store}
workers: {{count: 2, max_failures: 2}}
model: {{function: "late_model:late"}}
data: {{name: digits, limit: 300}}
num_examples: 49
batch_size: 10
attacks: [{{attack: pgd, threat: {{norm: linf, eps: 1/20}}, steps: 2}}]
"""


def test_a_model_of_the_users_own_that_fails_late_is_not_tried_again(head, fork_server, tmp_path):
    """The attacked examples that are left over make a batch of another size than the model was shown."""
    (tmp_path / "late_model.py").write_text(LATE)
    (tmp_path / "late.yaml").write_text(EVALUATION.format(store=tmp_path / "runs"))
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    before = worker_actors(head)
    done = fork_server.run(
        ["-m", "poise", "run", "late.yaml", "--allow-code", "--address", head.address], cwd=tmp_path, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "the model late_model:late raised RuntimeError on a batch of shape (" in done.stderr
    assert "late_model.py:6 in forward: return super()" in done.stderr
    assert "Traceback" not in done.stderr
    assert "a worker died" not in done.stderr + done.stdout
    assert open_run(str(tmp_path / "runs"), "late").manifest().status == "failed"
    assert len(worker_actors(head) - before) == 2, "another worker group was started"


def worker_actors(head) -> set[str]:
    """The ids of all workers of worker groups that the cluster has had so far."""
    from ray.util.state import list_actors

    filters = [("class_name", "=", "RayTrainWorker")]
    return {actor.actor_id for actor in list_actors(address=head.dashboard, filters=filters, limit=10_000)}


OWN_KIND = """\
from poise.kinds.robust_train.spec import RobustTrainSpec

class Mine(RobustTrainSpec):
    pass
"""

DRIVER = """\
import sys
from pathlib import Path
import yaml
import kind_of_mine
from poise.engine.ray.worker_group import cluster, run_worker_group
from poise.errors import UserError
from poise.observe.progress import Display
from poise.observe.sinks import NullSink

Path("kind_of_mine.py").unlink()  # the workers are on machines that never had it
spec = kind_of_mine.Mine.model_validate(yaml.safe_load(Path(sys.argv[2]).read_text()))
with cluster(sys.argv[1], [spec]):
    try:
        run_worker_group(spec, Display(sys.stdout), NullSink())
    except UserError as error:
        print("UserError:", error)
"""


def test_a_worker_that_lacks_a_module_of_the_spec_ends_the_run_in_one_line(head, desk, tmp_path, fork_server):
    (tmp_path / "kind_of_mine.py").write_text(OWN_KIND)
    spec = desk.spec("lacking", str(tmp_path / "runs"))
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = fork_server.run(["-c", DRIVER, head.address, str(spec)], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    starting, told = done.stdout.splitlines()
    assert starting == "[lacking] starting 2 workers"
    assert re.fullmatch(r"UserError: the machine \S+ lacks a module .*kind_of_mine.*: install it on every .*", told)


def test_mistakes_about_jobs_are_answered_without_a_traceback(head, desk, tmp_path, poise):
    unknown = poise("status", "poise-none", "--address", head.dashboard)
    assert (unknown.returncode, "has no job poise-none" in unknown.stderr) == (2, True)
    nobody = poise("status", "poise-none", "--address", "http://127.0.0.1:9")
    assert (nobody.returncode, "no Ray cluster answers" in nobody.stderr) == (2, True)
    assert "Traceback" not in unknown.stderr + nobody.stderr


TUNE = """\
kind: finetune.sft
name: {name}
seed: 3
store: {store}
workers: {{count: {workers}, max_failures: 2}}
model: {{name: llama, hidden: 32, layers: 1, heads: 1}}
data: {{name: world, split: pretrain, world: {{entities: 6, relations: 2}}}}
loss: {{name: gem, beta: 0.7}}
batch_size: 16
train:
  steps: {steps}
  accumulate: 2
  optimizer: {{name: adamw, lr: 1e-3}}
  checkpoint: {{every: {{steps: 20}}, keep: 100}}
  evaluate_every: {{steps: 40}}
  log_every: 5
"""

BOUND = """\
kind: bounds.report
name: {name}
seed: 3
store: {store}
workers: {{count: {workers}, max_failures: 2}}
runs: [measured]
num_examples: {steps}
"""


def test_fine_tuning_with_a_killed_worker_and_a_killed_driver(
    head, desk, fork_server, tmp_path, assert_same, artifacts
):
    """Against two processes without Ray to which nothing happens."""
    store, sizes = str(tmp_path / "runs"), {"workers": 2, "steps": 200, "text": TUNE}
    job = desk.start("killed", store, address=head.address, **sizes)
    job.until_committed(2)
    os.kill(job.worker_pids()[1], signal.SIGKILL)
    job.until_committed(4)
    job.kill()
    assert job.run.manifest().status == "running"
    spec = desk.spec("whole", store, **sizes)
    done = fork_server.run_ranks(["-m", "poise", "run", str(spec), "--engine", "local"])
    assert done.returncode == 0, done.stderr
    desk.finish("killed", store, address=head.address, **sizes)
    starts = [event["step"] for event in job.run.events() if event["event"] == "start"]
    assert len(starts) == 3
    assert starts[0] < starts[1] < starts[2] < 200
    whole = open_run(store, "whole")
    assert_same(job.run, whole)
    assert artifacts(job.run) == artifacts(whole)


def test_a_report_of_bounds_with_a_killed_worker_and_a_killed_driver(head, desk, tmp_path, artifacts):
    """Against one by a process without Ray to which nothing happens."""
    store, sizes = str(tmp_path / "runs"), {"workers": 1, "steps": 300, "text": BOUND}
    desk.finish("measured", store, engine="local", workers=1, steps=20)
    whole = desk.finish("whole", store, engine="local", **sizes)
    job = desk.start("killed", store, address=head.address, **sizes)
    job.until(lambda: "[killed] measure" in job.text(), timeout=300)
    job.kill_one("RayTrainWorker", below=head.pid)
    job.until(lambda: "[killed] a worker died" in job.text())
    job.kill()
    assert job.run.manifest().status == "running"
    desk.finish("killed", store, address=head.address, **sizes)
    assert artifacts(job.run) == artifacts(whole)
    assert open_run(store, "measured").manifest().status == "finished"
