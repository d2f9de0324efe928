"""Steps per second of the training loop beside a bare loop written by hand; the floor is 0.97 of it.

Both train the same network on the same batches under the same attack with the same optimizer, in turns, in one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

from poise.data.batches import Batches, load
from poise.data.spec import DataSpec
from poise.models.build import build
from poise.models.spec import ModelSpec
from poise.robust.attacks import perturb
from poise.robust.threats import Threat
from poise.spec import Real
from poise.store.runs import open_run
from poise.train.context import Context
from poise.train.loop import fit
from poise.train.spec import Checkpointing, Every, Sgd, TrainSpec
from poise.train.task import StepOutput, Task

STEPS, ROUNDS = 300, 7
DATA = load(DataSpec(name="digits", batch_size=128), seed=0)
THREAT = Threat("linf", 0.15)


def network() -> nn.Module:
    return build(ModelSpec(name="cnn", width=16), shape=DATA.shape, classes=10, mean=DATA.mean, std=DATA.std, seed=0)


def batches() -> Batches:
    return Batches(DATA.train.images, DATA.train.labels, batch_size=128, seed=0)


def loss_of(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, attack_steps: int, noise: torch.Generator
) -> torch.Tensor:
    if attack_steps:
        inner = getattr(model, "module", model)
        x = perturb(inner, x, y, THREAT, steps=attack_steps, generator=noise)
    return nn.functional.cross_entropy(model(x), y)


def bare(attack_steps: int) -> float:
    """What a user writes: fetch, attack, forward, backward, step."""
    model, stream, noise = network(), batches(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    model.train()
    started = time.perf_counter()
    for step in range(STEPS):
        x, y = stream.batch(step)
        loss = loss_of(model, x, y, attack_steps, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return STEPS / (time.perf_counter() - started)


def ours(attack_steps: int) -> float:
    """The loop, with its rows, timers and seeds; one commit at the end, whose time is taken out."""
    model, stream = network(), batches()

    def step(model, batch, state, turn):
        with turn.timers("attack"):
            loss = loss_of(model, *batch, attack_steps, turn.generator)
        return StepOutput(loss, {}, state)

    every = Every(steps=STEPS)
    spec = TrainSpec(
        steps=STEPS, optimizer=Sgd(lr=Real("0.1")), checkpoint=Checkpointing(every=every), evaluate_every=every
    )
    task = Task(model, stream.batch, step, stream.steps_per_epoch, 128)
    with tempfile.TemporaryDirectory() as folder:
        context = Context(open_run(folder, "bench"))
        seconds: list[float] = []
        watch_commits(context, seconds)
        started = time.perf_counter()
        fit(task, spec, context)
        return STEPS / (time.perf_counter() - started - sum(seconds))


def watch_commits(context: Context, seconds: list[float]) -> None:
    """Add up what writing to the store takes, which a bare loop does not do at all."""
    together = context.together

    def timed(action: Callable[[], object]) -> object:
        started = time.perf_counter()
        try:
            return together(action)
        finally:
            seconds.append(time.perf_counter() - started)

    context.together = timed  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    for attack_steps in (10, 1, 0):
        rates = [(bare(attack_steps), ours(attack_steps)) for _ in range(ROUNDS)]
        ratio = statistics.median(mine / reference for reference, mine in rates)
        low, high = min(b / a for a, b in rates), max(b / a for a, b in rates)
        reference, mine = (statistics.median(column) for column in zip(*rates, strict=True))
        print(
            f"  PGD-{attack_steps:<2}  bare {reference:7.1f} steps/s   poise {mine:7.1f} steps/s   "
            f"ratio {ratio:.3f} [{low:.3f}, {high:.3f}] over {ROUNDS} rounds of {STEPS} steps"
        )


if __name__ == "__main__":
    main()
