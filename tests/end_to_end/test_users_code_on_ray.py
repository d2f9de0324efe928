"""Modules of the user's own reach the workers of a cluster that `poise run` joins, wherever they lie here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from poise.store.runs import open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HELPER = "WIDTH = 16\n"
MODULE = """\
import torch
from torch import nn

def make():
    from helper_of_mine import WIDTH
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
"""


def spec_of(store: str) -> dict[str, Any]:
    return {
        "kind": "robust.evaluate", "name": "judged", "store": store, "data": {"name": "digits"}, "num_examples": 20,
        "model": {"function": "module_of_mine:make"},
        "attacks": [{"attack": "fgsm", "threat": {"norm": "linf", "eps": 0.01}}],
    }  # fmt: skip


def test_a_module_that_only_this_machine_has_is_sent_to_the_workers(head, fork_server, tmp_path):
    """It lies on the Python path of this command, which the workers do not have, and imports another beside it."""
    code, elsewhere = tmp_path / "code", tmp_path / "elsewhere"
    code.mkdir()
    elsewhere.mkdir()
    (code / "module_of_mine.py").write_text(MODULE)
    (code / "helper_of_mine.py").write_text(HELPER)
    store = str(tmp_path / "runs")
    (elsewhere / "spec.yaml").write_text(yaml.safe_dump(spec_of(store)))
    path = os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")])
    arguments = ["-m", "poise", "run", "spec.yaml", "--allow-code", "--address", head.address]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = fork_server.run(arguments, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stderr
    summary = json.loads(open_run(store, "judged").read("result.json"))
    assert summary["num_examples"] == 20
    assert {path.name for path in Path(elsewhere).iterdir()} == {"spec.yaml"}


def test_an_objective_of_the_users_is_sent_to_workers_and_to_the_trials_of_a_sweep(
    head, mylab, fork_server, tmp_path_factory
):
    """The example of docs/extend.md: its class is validated here, and unpickled in every process of the cluster."""
    quick = {"data": {"name": "digits", "limit": 200, "validation": 40, "batch_size": 20}, "train": {"steps": 4}}
    example = yaml.safe_load((mylab / "own-objective.yaml").read_text()) | quick | {"evaluate": {"num_examples": 20}}
    del example["name"]
    sweep = {"kind": "sweep", "metric": "robust/union", "mode": "max", "base": example}
    stages = {"group": {**example, "workers": {"count": 2}}, "swept": {**sweep, "space": {"seed": {"grid": [0, 1]}}}}
    store = str(mylab / "runs")
    pipeline = {"kind": "pipeline", "name": "line", "store": store, "stages": stages}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "spec.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    path = os.pathsep.join([str(mylab), os.environ.get("PYTHONPATH", "")])
    arguments = ["-m", "poise", "run", "spec.yaml", "--allow-code", "--address", head.address]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = fork_server.run(arguments, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("line-group", "line-swept-0000", "line-swept-0001"):
        assert json.loads(open_run(store, name).read("result.json"))["objective"] == "mylab.focal:Focal"
