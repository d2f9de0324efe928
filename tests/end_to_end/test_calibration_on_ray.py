"""Measuring calibration on Ray with a real vLLM engine: whatever is killed, the same samples and figures in the end."""

from __future__ import annotations

import io

import psutil
import pyarrow.parquet as pq
import pytest

from poise.data.spec import WorldSpec
from poise.data.worlds import make_world
from poise.models.language import export, new_llama
from poise.models.spec import LanguageModelSpec
from poise.store.runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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


def kill_one(driver: int, name: str) -> None:
    """SIGKILL for a process of that Ray actor, in the private cluster of that driver."""
    below = psutil.Process(driver).children(recursive=True)
    next(process for process in below if process.name().startswith(name)).kill()


def artifacts(run: Run) -> dict[str, bytes]:
    """What must not depend on what happened on the way, the name of the run aside."""
    found = {name: run.read(name) for name in run.files("artifacts/") if not name.endswith(".html")}
    return {name: data.replace(f'"{run.name}"'.encode(), b"") for name, data in found.items()}


def samples(run: Run) -> dict[str, list[dict[str, object]]]:
    return {name: pq.read_table(io.BytesIO(run.read(name))).to_pylist() for name in run.files("samples/")}


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
