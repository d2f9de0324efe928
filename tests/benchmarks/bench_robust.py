"""Images per second of adversarial training: ours beside a loop written the usual way, and beside torchattacks' PGD.

The usual way: `loss.backward()` in the attack, which computes the weights' gradients too, float32, contiguous images
from a DataLoader. PreAct-ResNet-18 on images of 32 x 32; PGD-10, and ADT over three norms of 10 steps each. All take
turns, a step each; the figure is the median of the turns. The last lines set the attack loop beside its floor: as many
forwards and input gradients, measured alone.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.kinds.robust_train.step import RobustStep
from poise.models.build import build
from poise.models.spec import ModelSpec
from poise.observe.timers import PhaseTimers
from poise.robust.attacks import perturb
from poise.robust.threats import Threat
from poise.train.task import StepContext

BATCH, STEPS, TURNS = 32, 10, 5
THREATS = {"linf": Threat("linf", 8 / 255), "l2": Threat("l2", 0.5), "l1": Threat("l1", 12.0)}


def network(*, channels_last: bool = False) -> nn.Module:
    spec = ModelSpec(name="preact_resnet18", channels_last=channels_last)
    return build(spec, shape=(3, 32, 32), classes=10, mean=[0.5] * 3, std=[0.25] * 3, seed=0)


def batches() -> DataLoader[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(8 * BATCH, 3, 32, 32, generator=draw), torch.randint(10, (8 * BATCH,), generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True, drop_last=True)


class Usual:
    """Training as most scripts have it."""

    def __init__(self, norms: tuple[str, ...]) -> None:
        self.model, self.norms = network(), norms
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.loader = batches()
        self.data = iter(self.loader)

    def __call__(self) -> None:
        try:
            x, y = next(self.data)
        except StopIteration:
            self.data = iter(self.loader)
            x, y = next(self.data)
        points = [self.attack(x, y, THREATS[norm]) for norm in self.norms]
        self.optimizer.zero_grad()
        losses = [nn.functional.cross_entropy(self.model(point), y) for point in points]
        loss = torch.stack(losses).mean()
        loss.backward()
        self.optimizer.step()

    def attack(self, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        delta = threat.random_start(x)
        for _ in range(STEPS):
            delta = delta.detach().requires_grad_()
            nn.functional.cross_entropy(self.model(x + delta), y).backward()
            assert delta.grad is not None
            step = threat.steepest_step(delta.grad, 2.5 * threat.eps / STEPS, at=(x + delta).detach(), sparsity=20)
            delta = threat.project(x, (delta + step).detach())
        return (x + delta).detach()


class Peer(Usual):
    """The same, with the attack of torchattacks (linf)."""

    def attack(self, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        import torchattacks

        attack = torchattacks.PGD(self.model, eps=threat.eps, alpha=2.5 * threat.eps / STEPS, steps=STEPS)
        points: Tensor = attack(x, y)
        return points


class Ours:
    """A step of `robust.train` as the loop takes it, with the optimizer behind it."""

    def __init__(
        self, norms: tuple[str, ...], *, precision: torch.dtype = torch.float32, compiled: bool = False
    ) -> None:
        threats = {norm: {"eps": THREATS[norm].eps, "steps": STEPS} for norm in norms}
        spec = RobustTrainSpec.model_validate(
            {
                "kind": "robust.train",
                "name": "bench",
                "data": {"name": "cifar10", "root": "none", "batch_size": BATCH},
                "model": {"name": "preact_resnet18"},
                "threats": threats,
                "objective": {"name": "adt" if len(norms) > 1 else "at"},
                "compute": {"compile": compiled},
                "train": {"steps": 1},
            }
        )
        self.model, self.precision = network(channels_last=True).train(), precision
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, foreach=True)
        self.part = RobustStep(spec, self.model, 1)
        self.state, self.batch = self.part.initial(), tuple(next(iter(batches())))
        self.turn = StepContext(0, 0, True, torch.Generator().manual_seed(0), PhaseTimers(), lambda values: values)

    def __call__(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
            loss, _, self.state = self.part.step(self.model, self.batch, self.state, self.turn)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turns(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            spent = seconds(run)
            if turn:
                taken[name].append(spent)
    return taken


def has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512_bf16" in flags or "amx_tile" in flags


def training(title: str, norms: tuple[str, ...]) -> None:
    runs: dict[str, Callable[[], object]] = {"usual": Usual(norms), "ours fp32": Ours(norms)}
    runs["ours compiled"] = Ours(norms, compiled=True)
    if len(norms) == 1:
        runs["torchattacks"] = Peer(norms)
    if has_bf16():
        runs["ours bf16"] = Ours(norms, precision=torch.bfloat16)
    taken = in_turns(runs, TURNS)
    for name, spent in taken.items():
        ratios = [usual / own for usual, own in zip(taken["usual"], spent, strict=True)]
        print(
            f"  {title:<22} {name:<13} {BATCH / statistics.median(spent):7.1f} images/s   "
            f"{statistics.median(ratios):.2f} times the usual loop [{min(ratios):.2f}, {max(ratios):.2f}]",
            flush=True,
        )
    if not has_bf16():
        print(f"  {title:<22} ours bf16     not measured: this processor has no bf16 arithmetic", flush=True)


def floor() -> None:
    """The attack loop beside k forwards and input gradients that do nothing else."""
    model = network(channels_last=True).eval().requires_grad_(False)
    x, y = next(iter(batches()))
    x = x.to(memory_format=torch.channels_last)

    def passes() -> None:
        for _ in range(STEPS):
            point = x.detach().requires_grad_()
            torch.autograd.grad(nn.functional.cross_entropy(model(point), y, reduction="sum"), point)

    draw = torch.Generator().manual_seed(0)
    runs: dict[str, Callable[[], object]] = {"passes": passes}
    for norm, threat in THREATS.items():
        runs[norm] = partial(perturb, model, x, y, threat, steps=STEPS, noise=draw)
    taken = in_turns(runs, TURNS)
    for norm in THREATS:
        ratios = [own / alone for own, alone in zip(taken[norm], taken["passes"], strict=True)]
        print(
            f"  attack loop {norm:<5} {statistics.median(ratios):.3f} times {STEPS} forwards and input gradients "
            f"[{min(ratios):.3f}, {max(ratios):.3f}]",
            flush=True,
        )


def main() -> None:
    warnings.filterwarnings("ignore")
    print(f"  batch {BATCH}, {torch.get_num_threads()} threads, PreAct-ResNet-18, {STEPS} steps, {TURNS} turns")
    training("PGD-10 linf", ("linf",))
    training("ADT linf l2 l1", ("linf", "l2", "l1"))
    floor()


if __name__ == "__main__":
    main()
