"""Steps per second of the training loop beside a bare loop written by hand; the floor is 0.97 of it.

Both train the same network on the same batches under the same attack with the same optimizer, in short turns, in one
process on one thread. Seconds are those of the processor, which other programs on the machine do not add to.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import torch
from torch import Tensor, nn

from poise.data.images.batches import Batches, load
from poise.data.images.spec import DataSpec
from poise.models.build import build
from poise.models.spec import ModelSpec
from poise.robust.attacks import perturb
from poise.robust.threats import Threat
from poise.spec import ExactNumber
from poise.store.runs import open_run
from poise.train.context import Context
from poise.train.loop import fit
from poise.train.spec import Checkpointing, Interval, Sgd, TrainSpec
from poise.train.task import StepContext, StepOutput, Task, TaskState

WARM, STEPS, ROUNDS = 5, 105, 15
DATA = load(DataSpec(name="digits", batch_size=128), seed=0)
THREAT = Threat("linf", 0.15)


def network() -> nn.Module:
    return build(ModelSpec(name="cnn", width=16), shape=DATA.shape, classes=10, mean=DATA.mean, std=DATA.std, seed=0)


class Stream:
    """The batches of a run, which notes when the first and the last step after warm-up began (processor seconds)."""

    def __init__(self) -> None:
        self.batches = Batches(DATA.train.images, DATA.train.labels, batch_size=128, seed=0)
        self.times: dict[int, float] = {}

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step in (WARM, STEPS - 1):
            self.times[step] = time.process_time()
        return self.batches.batch(step)

    def steps_per_second(self) -> float:
        return (STEPS - 1 - WARM) / (self.times[STEPS - 1] - self.times[WARM])


def loss_of(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, attack_steps: int, noise: torch.Generator
) -> torch.Tensor:
    if attack_steps:
        inner = getattr(model, "module", model)
        x = perturb(inner, x, y, THREAT, steps=attack_steps, noise=noise)
    return nn.functional.cross_entropy(model(x), y)


def bare(attack_steps: int) -> float:
    """What a user writes: fetch, attack, forward, backward, step."""
    model, stream, noise = network(), Stream(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    model.train()
    for step in range(STEPS):
        x, y = stream.batch(step)
        loss = loss_of(model, x, y, attack_steps, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return stream.steps_per_second()


def ours(attack_steps: int) -> float:
    """The loop, with its rows, timers and seeds; commits are timed by the engine benchmark."""
    model, stream = network(), Stream()

    def step(model: nn.Module, batch: tuple[Tensor, Tensor], state: TaskState, step_context: StepContext) -> StepOutput:
        x, y = batch
        with step_context.timers("attack"):
            loss = loss_of(model, x, y, attack_steps, step_context.generator)
        return StepOutput(loss, {}, state)

    end = Interval(steps=STEPS)
    spec = TrainSpec(
        steps=STEPS, optimizer=Sgd(lr=ExactNumber("0.1")), checkpoint=Checkpointing(every=end), evaluate_every=end
    )
    with tempfile.TemporaryDirectory() as folder:
        task = Task(model, stream.batch, step, stream.batches.steps_per_epoch, 128)
        fit(task, spec, Context(open_run(folder, "bench")))
    return stream.steps_per_second()


def main() -> None:
    torch.set_num_threads(1)
    for attack_steps in (10, 1, 0):
        rates = [(bare(attack_steps), ours(attack_steps)) for _ in range(ROUNDS)]
        ratio = statistics.median(mine / reference for reference, mine in rates)
        low, high = min(b / a for a, b in rates), max(b / a for a, b in rates)
        reference, mine = (statistics.median(column) for column in zip(*rates, strict=True))
        print(
            f"  PGD-{attack_steps:<2}  bare {reference:7.1f} steps/s   poise {mine:7.1f} steps/s   "
            f"ratio {ratio:.3f} [{low:.3f}, {high:.3f}] over {ROUNDS} rounds of {STEPS - WARM} steps"
        )


if __name__ == "__main__":
    main()
