"""Each further kind on Ray, and SIGKILL for its worker, its engine and its driver: the same results in the end."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from poise.data.spec import WorldSpec
from poise.data.worlds import make_world
from poise.models.language import export, new_llama
from poise.models.spec import LanguageModelSpec
from poise.store.runs import Run, open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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

MEASURE = """\
kind: calibrate.measure
name: {{name}}
seed: 3
store: {{store}}
workers: {{{{count: {{workers}}, max_failures: 2}}}}
model: {{{{folder: {folder}}}}}
questions: {{{{name: world, world: {world}}}}}
samples: {{steps}}
decoding: {{{{max_tokens: 8}}}}
bootstrap: 50
"""

BOUND = """\
kind: bounds.report
name: {name}
seed: 3
store: {store}
workers: {{count: {workers}, max_failures: 2}}
runs: [measured]
examples: {steps}
"""


def kill_one(driver: int, name: str) -> None:
    """SIGKILL for a process of that Ray actor, below the driver whose private cluster it is in."""
    for process in psutil.Process(driver).children(recursive=True):
        if process.name().startswith(name):
            process.kill()
            return
    raise AssertionError(f"there is no {name}")


def artifacts(run: Run) -> dict[str, bytes]:
    """What must not depend on what happened on the way, the name of the run aside."""
    found = {name: run.read(name) for name in run.files("artifacts/") if not name.endswith(".html")}
    return {name: data.replace(f'"{run.name}"'.encode(), b"") for name, data in found.items()}


def samples(run: Run) -> dict[str, list[dict[str, object]]]:
    import io

    import pyarrow.parquet as pq

    return {name: pq.read_table(io.BytesIO(run.read(name))).to_pylist() for name in run.files("samples/")}


def test_fine_tuning_with_a_killed_worker_and_a_killed_driver(desk, tmp_path, assert_same):
    store, size = str(tmp_path / "runs"), {"workers": 2, "steps": 200, "text": TUNE}
    whole = desk.finish("whole", store, **size)
    job = desk.start("killed", store, **size)
    job.until_committed(2)
    os.kill(job.worker_pids()[1], signal.SIGKILL)
    job.until_committed(4)
    job.kill()
    assert job.run.manifest().status == "running"
    desk.finish("killed", store, **size)
    starts = [event["step"] for event in job.run.events() if event["event"] == "start"]
    assert len(starts) == 3
    assert starts[0] < starts[1] < starts[2] < 200
    assert_same(job.run, whole)
    assert artifacts(job.run) == artifacts(whole)


def test_measuring_calibration_with_a_killed_engine_a_killed_worker_and_a_killed_driver(desk, tmp_path):
    world = {"entities": 120, "relations": 8}
    made = make_world(WorldSpec(**world))
    tokenizer = made.tokenizer()
    llama = new_llama(LanguageModelSpec(name="llama", hidden=32, layers=1, heads=1), tokenizer, seed=0)
    export(llama, tokenizer, tmp_path / "model")
    listed = ", ".join(f"{key}: {value}" for key, value in world.items())
    text = MEASURE.format(folder=tmp_path / "model", world="{{" + listed + "}}")
    store, size = str(tmp_path / "runs"), {"workers": 1, "steps": 50, "text": text}
    whole = desk.finish("whole", store, **size)
    shards = len(samples(whole))
    assert shards >= 3
    job = desk.start("killed", store, **size)
    drawn = lambda count: len(job.run.files("samples/")) >= count  # noqa: E731
    job.until(lambda: drawn(1), timeout=300)
    kill_one(job.process.pid, "ray::_Engine")
    job.until(lambda: drawn(2), timeout=300)
    kept = {name: job.run.read(name) for name in job.run.files("samples/")}
    kill_one(job.process.pid, "ray::RayTrainWorker")
    job.until(lambda: drawn(3), timeout=300)
    job.kill()
    assert job.run.manifest().status == "running"
    desk.finish("killed", store, **size)
    assert {name: job.run.read(name) for name in kept} == kept, "a committed shard was drawn again"
    assert any("engine" in str(event) and "died" in str(event) for event in job.run.events())
    assert samples(job.run) == samples(whole)
    assert artifacts(job.run) == artifacts(whole)


def test_a_report_of_bounds_with_a_killed_worker_and_a_killed_driver(desk, tmp_path):
    store = str(tmp_path / "runs")
    desk.finish("measured", store, engine="local", workers=1, steps=20)
    size = {"workers": 1, "steps": 300, "text": BOUND}
    whole = desk.finish("whole", store, **size)
    job = desk.start("killed", store, **size)
    job.until(lambda: "measure" in job.text())
    kill_one(job.process.pid, "ray::RayTrainWorker")
    job.until(lambda: "a worker died" in job.text())
    job.kill()
    assert job.run.manifest().status == "running"
    desk.finish("killed", store, **size)
    assert artifacts(job.run) == artifacts(whole)
    assert open_run(store, "measured").manifest().status == "finished"
