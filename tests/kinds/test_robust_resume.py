"""Killed in the middle of a step and started again, every objective and every average ends in the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from poise import kinds
from poise.kinds.robust_step import RobustStep
from poise.kinds.specs.robust import RobustTrainSpec
from poise.observe.rows import read_rows
from poise.store.runs import Run, open_run
from poise.train.context import Context

LINF, L2, L1 = {"eps": 0.1, "steps": 1}, {"eps": 0.5, "steps": 1}, {"eps": 2, "steps": 1}
ONE, TWO, THREE = {"linf": LINF}, {"linf": LINF, "l1": L1}, {"linf": LINF, "l2": L2, "l1": L1}
EVERY_STEP = {"every": {"steps": 1}}
SWA, EMA, AWP = {"name": "swa", **EVERY_STEP}, {"name": "ema", "start": {"steps": 1}}, {"awp": {"gamma": 0.05}}
MEA = {"name": "mea", "pull": 0.5, "every": {"steps": 2}}

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


def spec_of(name: str, case: dict[str, Any], **train: Any) -> RobustTrainSpec:
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
            **train,
        },
        "evaluate": {"examples": 20},
    }
    return RobustTrainSpec.model_validate({**values, **case, "objective": objective})


class Killed(BaseException):
    """Not an Exception: nothing may catch it and tidy up."""


def tensors(run: Run, scratch: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint, and the averaged weights."""
    folder = run.checkpoints.fetch(run.checkpoints.commits()[-1], scratch / run.name)
    found = {f"{file.stem}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    if "artifacts/averaged.safetensors" in run.files("artifacts/"):
        found |= {f"averaged/{k}": v for k, v in load(run.read("artifacts/averaged.safetensors")).items()}
    return found


def rows(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_rows(run.read(file) for file in run.files("metrics/rows-")).to_pylist()
    return found


@pytest.mark.parametrize("name", CASES)
def test_killed_it_ends_in_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, after = CASES[name], RobustStep.after
    whole, killed = (open_run(tmp_path / "runs", each) for each in ("whole", "killed"))
    kinds.run(spec_of("whole", case), Context(whole))

    def die(self: RobustStep, state: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        if step == 5:
            raise Killed
        return after(self, state, step)

    monkeypatch.setattr(RobustStep, "after", die)
    with pytest.raises(Killed):
        kinds.run(spec_of("killed", case), Context(killed))
    monkeypatch.setattr(RobustStep, "after", after)
    assert killed.checkpoints.commits()[-1].step < 5
    torch.manual_seed(99)  # a fresh process
    kinds.run(spec_of("killed", case), Context(killed))
    mine, theirs = tensors(killed, tmp_path), tensors(whole, tmp_path)
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key].nan_to_num(7), theirs[key].nan_to_num(7))] == []
    assert rows(killed) == rows(whole)
    summaries = [json.loads(run.read("artifacts/summary.json")) for run in (whole, killed)]
    assert summaries[0] | {"run": ""} == summaries[1] | {"run": ""}
    assert ("averaged" in summaries[0]["accuracy"]) == ("averaging" in case)
