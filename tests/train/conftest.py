"""A small task whose every part may matter to an exact resume: dropout, batch norm, momentum, state, schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from poise.observe.rows import read_rows
from poise.spec import ExactNumber
from poise.store.runs import Run, open_run
from poise.train.context import Context
from poise.train.loop import FitResult, fit
from poise.train.spec import AdamW, Checkpointing, Cosine, Interval, Sgd, TrainSpec
from poise.train.task import StepOutput, Task

STEPS, PER_EPOCH = 12, 4


def spec(**changes: Any) -> TrainSpec:
    values: dict[str, Any] = {
        "steps": STEPS,
        "optimizer": Sgd(lr=ExactNumber("0.05")),
        "schedule": Cosine(warmup_steps=3),
        "checkpoint": Checkpointing(every=Interval(steps=3), keep=100),
        "evaluate_every": Interval(steps=4),
        "log_every": 2,
        "clip_norm": ExactNumber(1),
    }
    return TrainSpec(**{**values, **changes})


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def task(interrupt: Callable[[int], None] = lambda index: None) -> Task:
    """A task that draws from the step's generator and from the global one, and keeps a counter of its own."""
    model = network()
    data = torch.Generator().manual_seed(1)
    images, labels = torch.randn(PER_EPOCH, 16, 5, generator=data), torch.randint(3, (PER_EPOCH, 16), generator=data)
    held_out = torch.randn(32, 5, generator=data)

    def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        interrupt(index)
        return images[index % PER_EPOCH], labels[index % PER_EPOCH]

    def step(model, batch, state, step_context):
        x, y = batch
        noise = torch.randn(x.shape, generator=step_context.generator)
        loss = nn.functional.cross_entropy(model(x + 0.1 * noise), y)
        return StepOutput(loss, {"noise": noise.mean()}, {"seen": state["seen"] + len(x)})

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            score = float(torch.sin(50 * model(held_out)).mean())
        model.train()
        return {"score": score}

    return Task(
        model, batch, step, PER_EPOCH, 16, seed=3, state={"seen": torch.zeros(())}, evaluate=evaluate, monitor="score"
    )


class Bench:
    """Runs of that task in one store."""

    def __init__(self, store: str) -> None:
        self.store = store

    def run(self, name: str) -> Run:
        return open_run(self.store, name)

    def fit(self, name: str, interrupt: Callable[[int], None] = lambda index: None, **changes: Any) -> FitResult:
        return fit(task(interrupt), spec(**changes), Context(self.run(name)))

    def tensors(self, name: str, step: int, scratch: Path) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint, by file and name."""
        checkpoints = self.run(name).checkpoints
        folder = checkpoints.fetch(checkpoints.at(step), scratch / f"{name}-{step}")
        files = sorted(folder.glob("*.safetensors"))
        return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Every row of metrics but those of the clock."""
        run = self.run(name)
        table = read_rows(run.read(file) for file in run.files("metrics/rows-"))
        return table.to_pylist()

    def steps(self, name: str) -> list[int]:
        return [commit.step for commit in self.run(name).checkpoints.commits()]

    def assert_equal(self, one: str, other: str, scratch: Path) -> None:
        """The two runs have the same checkpoints, bit by bit, and the same rows."""
        assert self.steps(one) == self.steps(other)
        assert self.rows(one) == self.rows(other)
        for step in self.steps(one):
            mine, theirs = (self.tensors(name, step, scratch / str(index)) for index, name in enumerate((one, other)))
            assert mine.keys() == theirs.keys()
            unequal = [
                name for name, value in mine.items() if not torch.equal(value.nan_to_num(7), theirs[name].nan_to_num(7))
            ]
            assert not unequal, f"step {step}: {unequal}"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(str(tmp_path / "runs"))


@pytest.fixture
def make_spec():
    return spec


@pytest.fixture
def make_task():
    return task


@pytest.fixture
def adamw() -> AdamW:
    return AdamW(lr=ExactNumber("0.01"))
