"""An evaluation by two processes, killed on the way and finished by one: the bytes of a run of one."""

from __future__ import annotations

import time

import pytest

from poise import kinds
from poise.engine.lifecycle import claim
from poise.kinds.robust_evaluate.spec import RobustEvaluateSpec
from poise.spec import dump
from poise.store.runs import Run, open_run
from poise.train.context import Context

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("allow_code")]

MODEL = """\
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""
LINF = {"norm": "linf", "eps": "1/100"}


def spec_of(store: str, name: str) -> RobustEvaluateSpec:
    attacks = [
        {"attack": "square", "threat": LINF, "queries": 300},
        {"attack": "pgd", "threat": LINF, "steps": 100},
        {"attack": "apgd", "threat": {"norm": "l2", "eps": "1/10"}, "steps": 100},
    ]
    values = {"kind": "robust.evaluate", "name": name, "store": store, "model": {"function": "of_a_test:network"}}
    values |= {"data": {"name": "digits"}, "split": "train", "batch_size": 8, "keep_adversarial": True}
    return RobustEvaluateSpec.model_validate({**values, "attacks": attacks, "num_examples": 1000})


def finish(spec: RobustEvaluateSpec) -> Run:
    run = open_run(spec.store, spec.name)
    with claim(run, spec):
        kinds.run(spec, Context(run))
    return run


def results(run: Run) -> dict[str, bytes]:
    """The result and every artifact, by path."""
    return {name: run.read(name) for name in [*run.files("artifacts/"), *run.files("result.json")]}


def result(run: Run) -> dict[str, bytes]:
    """All but the verdicts, which hold how long they took; of these, the names."""
    found = {name: data for name, data in results(run).items() if "/chunks/" not in name}
    found["result.json"] = found["result.json"].replace(run.name.encode(), b"")
    return {**found, "chunks": "".join(run.files("artifacts/chunks/")).encode()}


def test_two_ranks_that_are_killed_and_one_that_goes_on_are_one_that_was_left_alone(tmp_path, monkeypatch, fork_server):
    (tmp_path / "of_a_test.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    store = str(tmp_path / "runs")
    spec = spec_of(store, "killed")
    (tmp_path / "spec.yaml").write_text(dump(spec))
    with (tmp_path / "log").open("wb") as log:
        ranks = fork_server.start_ranks(["-m", "poise", "run", "spec.yaml", "--engine", "local"], log, log)
    run, deadline = open_run(store, "killed"), time.monotonic() + 120
    while len(run.files("artifacts/chunks/square-linf/")) < 3 and time.monotonic() < deadline:
        assert [rank.poll() for rank in ranks] == [None, None], (tmp_path / "log").read_text()
        time.sleep(0.005)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()
    before = results(run)
    assert "result.json" not in before
    finish(spec)
    assert before.items() <= results(run).items()
    assert result(run) == result(finish(spec_of(store, "whole")))
