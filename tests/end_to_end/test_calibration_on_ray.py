"""Measuring calibration on Ray with a real vLLM engine: whatever is killed, the same samples and figures in the end."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest

from poise.data.synthetic_facts import make_world
from poise.data.world_spec import WorldSpec
from poise.models.language import export, new_llama
from poise.models.spec import LanguageModelSpec
from poise.store.runs import Run, open_run

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
sampler: {{{{memory: 0.25}}}}
decoding: {{{{max_tokens: 8}}}}
bootstrap: 50
"""


def samples(run: Run) -> dict[str, list[dict[str, object]]]:
    return {name: pq.read_table(io.BytesIO(run.read(name))).to_pylist() for name in run.files("samples/")}


def engine_deaths(run: Run) -> list[dict[str, object]]:
    return [event for event in run.events() if event["event"] == "sampler_restart"]


def test_measuring_calibration_with_a_killed_engine_a_killed_worker_and_a_killed_driver(
    head, desk, artifacts, tmp_path
):
    world = {"entities": 240, "relations": 8}  # so many shards that a kill comes before the last on any machine
    made = make_world(WorldSpec(**world))
    tokenizer = made.tokenizer()
    llama = new_llama(LanguageModelSpec(name="llama", hidden=32, layers=1, heads=1), tokenizer, seed=0)
    export(llama, tokenizer, tmp_path / "model")
    listed = ", ".join(f"{key}: {value}" for key, value in world.items())
    text = MEASURE.format(folder=tmp_path / "model", world="{{" + listed + "}}")
    both = {"store": str(tmp_path / "runs"), "workers": 1, "steps": 6, "text": text, "address": head.address}
    job = desk.start_twice(**both)
    job.until(lambda: len(job.run.files("samples/")) >= 1, timeout=400)
    whole = open_run(both["store"], "whole")
    assert len(samples(whole)) >= 7
    job.kill_one("_Engine", below=head.pid)
    job.until(lambda: engine_deaths(job.run), timeout=300)
    count = len(job.run.files("samples/"))  # a shard that was drawn before the kill may still have been committed
    job.until(lambda: len(job.run.files("samples/")) > count, timeout=300)
    kept = {name: job.run.read(name) for name in job.run.files("samples/")}
    engine = job.newest("_Engine", below=head.pid)
    job.kill_one("RayTrainWorker", below=head.pid)
    job.until(lambda: len(job.run.files("samples/")) > len(kept), timeout=300)
    assert job.newest("_Engine", below=head.pid) == engine, "the engine was started anew for the next worker"
    job.kill()
    assert job.run.manifest().status == "running"
    desk.finish_twice(**both)
    assert {name: job.run.read(name) for name in kept} == kept, "a committed shard was drawn again"
    assert engine_deaths(job.run)
    assert samples(job.run) == samples(whole)
    assert artifacts(job.run) == artifacts(whole)
