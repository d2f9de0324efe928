"""Killed by SIGKILL in mid-step and started again, every objective and every average ends in the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from fork_server import ForkServer
from poise import kinds
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.observe.rows import read_rows
from poise.store.runs import Run, open_run
from poise.train.context import Context

LINF, L2, L1 = {"eps": 0.1, "steps": 1}, {"eps": 0.5, "steps": 1}, {"eps": 2, "steps": 1}
ONE, TWO, THREE = {"linf": LINF}, {"linf": LINF, "l1": L1}, {"linf": LINF, "l2": L2, "l1": L1}
EVERY_STEP = {"every": {"steps": 1}}
SWA, EMA, AWP = {"name": "swa", **EVERY_STEP}, {"name": "ema", "start": {"steps": 1}}, {"awp": {"gamma": 0.05}}
MEA = {"name": "mea", "proximal_weight": 0.5, "every": {"steps": 2}}

CASES: dict[str, dict[str, Any]] = {
    "at-swa": {"objective": "at", "threats": ONE, "averaging": SWA},
    "trades-mea": {"objective": "trades", "threats": ONE, "averaging": MEA},
    "mart-awp": {"objective": "mart", "threats": ONE, **AWP},
    "avg-ema": {"objective": "avg", "threats": TWO, "averaging": EMA},
    "sequential-awp-ema": {"objective": {"name": "avg", "mode": "sequential"}, "threats": TWO, "averaging": EMA, **AWP},
    "max-awp-mea": {"objective": "max", "threats": TWO, "averaging": MEA | {"rule": "const"}, **AWP},
    "sat-mea": {"objective": "sat", "threats": THREE, "averaging": MEA | {"rule": "ema"}},
    "msd-awp": {"objective": {"name": "msd", "steps": 2}, "threats": THREE, **AWP},
    "mix-swa": {"objective": "mix", "threats": TWO, "averaging": SWA},
    "adt-smoothness-swa": {"objective": {"name": "adt", "weighting": "smoothness"}, "threats": TWO, "averaging": SWA},
    "eat-awp": {"objective": "eat", "threats": TWO, **AWP},
    "ramp-projected-swa-awp": {"objective": "ramp", "threats": TWO, "averaging": SWA, **AWP},
    "fgsm-watched": {"objective": "fgsm_rs", "threats": ONE, "monitors": {"robust_gap": True, "overfitting": {}}},
    "gradalign-ema": {"objective": "gradalign", "threats": ONE, "averaging": EMA},
}


def values_of(name: str) -> dict[str, Any]:
    """A spec of six steps with a checkpoint after the fourth."""
    case = CASES[name]
    objective = case["objective"] if isinstance(case["objective"], dict) else {"name": case["objective"]}
    values = {
        "kind": "robust.train",
        "name": name,
        "model": {"name": "vgg11", "width": 2},
        "data": {"name": "digits", "batch_size": 40, "limit": 140, "validation": 20},
        "train": {
            "steps": 6,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "checkpoint": {"every": {"steps": 4}},
            "evaluate_every": {"steps": 4},
            "log_every": 1,
        },
        "evaluate": {"num_examples": 20},
    }
    return {**values, **case, "objective": objective}


KILLED = """
import json, os, signal, sys
import sklearn.datasets, torch._dynamo  # here, not once in every process
from poise import kinds
from poise.kinds import robust_train
from poise.kinds.robust_train.step import RobustStep
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.store.runs import open_run
from poise.train.context import Context

after = RobustStep.after

def die(self, state, step):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return after(self, state, step)

RobustStep.after = die
for values in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        kinds.run(RobustTrainSpec.model_validate(values), Context(open_run(sys.argv[1], values["name"])))
        os._exit(0)
    print(values["name"], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""Run each spec in a process of its own, which kills itself between the fifth step and what follows it."""


@pytest.fixture(scope="module")
def killed(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the run of every case has died of SIGKILL."""
    store = tmp_path_factory.mktemp("killed")
    arguments = ["-c", KILLED, str(store), json.dumps([values_of(name) for name in CASES])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3] / "platform")}
    done = fork_server.run(arguments, env=environment)
    assert done.stdout.splitlines() == [f"{name} {-signal.SIGKILL}" for name in CASES], done.stderr
    return store


def tensors(run: Run, scratch: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint, and the averaged weights."""
    folder = run.checkpoints.fetch(run.checkpoints.commits()[-1], scratch)
    found = {f"{file.stem}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    if "artifacts/averaged.safetensors" in run.files("artifacts/"):
        found |= {f"averaged/{k}": v for k, v in load(run.read("artifacts/averaged.safetensors")).items()}
    return found


def rows(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_rows(run.read(file) for file in run.files("metrics/rows-")).to_pylist()
    return found


@pytest.mark.parametrize("name", CASES)
def test_killed_it_ends_in_the_same_bits(name: str, killed: Path, tmp_path: Path) -> None:
    spec = RobustTrainSpec.model_validate(values_of(name))
    resumed, whole = open_run(killed, name), open_run(tmp_path / "whole", name)
    assert resumed.checkpoints.commits()[-1].step == 4
    for run in (resumed, whole):
        kinds.run(spec, Context(run))
    mine, theirs = (tensors(run, tmp_path / folder) for run, folder in ((resumed, "mine"), (whole, "theirs")))
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key].nan_to_num(7), theirs[key].nan_to_num(7))] == []
    assert rows(resumed) == rows(whole)
    summaries = [json.loads(run.read("result.json")) for run in (whole, resumed)]
    assert summaries[0] == summaries[1]
    assert ("averaged" in summaries[0]["accuracy"]) == ("averaging" in CASES[name])
