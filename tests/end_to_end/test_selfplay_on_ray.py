"""Self-play on Ray with a real vLLM engine: whatever is killed, the run ends in the bits of one left in peace."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from poise.data.synthetic_facts import make_world
from poise.data.world_spec import WorldSpec
from poise.models.language import export, new_llama
from poise.models.spec import LanguageModelSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORLD = {"entities": 2, "relations": 2, "answers": 4, "certain": 0, "ambiguous": 1, "tail": 4}

SPEC = """\
kind: align.selfplay
name: {{name}}
seed: 3
store: {{store}}
workers: {{{{count: {{workers}}, max_failures: 2}}}}
model: {{{{folder: {folder}}}}}
questions: {{{{name: world, split: prefer, world: {world}}}}}
oracle: {{{{name: cyclic}}}}
method: {{{{name: mpo, alpha: 0.1, period: 5, inner_steps: 2, opponents: 8}}}}
prompts: {questions}
rollouts: 8
sampler: {{{{memory: 0.25}}}}
max_tokens: 4
train:
  steps: {{steps}}
  optimizer: {{{{name: adamw, lr: 1e-3}}}}
  checkpoint: {{{{every: {{{{steps: 2}}}}, keep: 100}}}}
  evaluate_every: {{{{steps: 20}}}}
  log_every: 4
"""


@pytest.fixture
def text(tmp_path: Path) -> str:
    world = make_world(WorldSpec(**WORLD))
    tokenizer = world.tokenizer()
    export(new_llama(LanguageModelSpec(name="llama", hidden=32, layers=1, heads=1), tokenizer, seed=0), tokenizer,
           tmp_path / "model")  # fmt: skip
    listed = ", ".join(f"{key}: {value}" for key, value in WORLD.items())
    questions = len(world.questions("prefer"))
    return SPEC.format(folder=tmp_path / "model", world="{{" + listed + "}}", questions=questions)


def test_a_killed_engine_a_killed_worker_and_a_killed_driver(desk, tmp_path, text, assert_same):
    both = {"store": str(tmp_path / "runs"), "workers": 1, "steps": 60, "text": text}
    job = desk.start_twice(**both)
    job.until_committed(2)
    job.kill_one("_Engine")
    job.until_committed(6)
    engine = job.newest("_Engine")
    os.kill(job.worker_pids()[0], signal.SIGKILL)
    job.until_committed(10)
    assert job.newest("_Engine") == engine, "the engine was started anew for the next worker"
    job.kill()
    assert job.run.manifest().status == "running"
    whole = desk.finish_twice(**both)
    events = [event["event"] for event in job.run.events()]
    assert events.count("start") == 3
    assert any("engine" in str(event) and "died" in str(event) for event in job.run.events())
    assert_same(job.run, whole)
