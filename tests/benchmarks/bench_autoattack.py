"""AutoAttack beside pyautoattack: who stands under each, and seconds. Aims: one of 500 more at most, half the time.

A linear model whose exact robustness is known, and the adversarially trained MNIST network of the shared data. Both run
in one process on one thread; seconds are those of the processor, which other programs on the machine do not add to.

On that network FAB-T finds most of what is found under l2 and l1, and it has no random part. How far two runs of it can
be expected to agree is measured as well: who changes sides when every pixel moves by at most a millionth, and on whom
the two differ when pyautoattack projects in double precision, as its l2 projection needs.
"""

from __future__ import annotations

import os
import runpy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pyautoattack
import torch
from pyautoattack import fab_base
from torch import Tensor, nn

from poise.robust.attacks.autoattack import autoattack
from poise.robust.attacks.fab import fab
from poise.robust.spec import Norm
from poise.robust.threats import Threat

BATCH, MOVE = 500, 1e-6
LINEAR: dict[Norm, float] = {"linf": 0.014, "l2": 0.16, "l1": 1.5}
MNIST: dict[Norm, float] = {"linf": 0.3, "l2": 1.0, "l1": 3.0}
TESTS = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("POISE_SHARED_DATA", TESTS.parents[1] / "shared" / "data"))
ORACLES = runpy.run_path(str(TESTS / "robust" / "conftest.py"))


@dataclass(frozen=True)
class Case:
    """A model under a threat; `robust` bool (N,) is the truth where it is known."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    threat: Threat
    robust: Tensor | None = None


def cases() -> Iterator[Case]:
    """64 images 3x8x8 of ten classes with the exact answer, then 500 of MNIST."""
    generator = torch.Generator().manual_seed(0)
    model, x = ORACLES["_Linear"](192, 10), torch.rand(64, 3, 8, 8, generator=generator)
    nn.init.normal_(model.weight, generator=generator)
    nn.init.zeros_(model.bias)
    y = model(x).argmax(1)
    for norm, eps in LINEAR.items():
        robust = ORACLES["_slack"](deepcopy(model).double(), x.double(), y, norm, eps) > 0
        yield Case("linear", model, x, y, Threat(norm, eps), robust)
    if SHARED.is_dir():
        mnist = ORACLES["_mnist"](SHARED)
        for norm, eps in MNIST.items():
            yield Case("mnist", mnist.model, mnist.x[:BATCH], mnist.y[:BATCH], Threat(norm, eps))


def ours(case: Case) -> tuple[Tensor, float]:
    """(which examples stand, seconds)."""
    began = time.process_time()
    correct = autoattack(case.model, case.x, case.y, case.threat, batch_size=BATCH).correct
    return correct, time.process_time() - began


def theirs(case: Case, attacks: tuple[str, ...] = ()) -> tuple[Tensor, float]:
    """(which examples stand, seconds) of pyautoattack, or of some of its attacks alone."""
    began = time.process_time()
    peer = pyautoattack.AutoAttack(case.model, norm=case.threat.norm.capitalize(), eps=case.threat.eps, seed=0)
    if attacks:
        peer.attacks_to_run = list(attacks)
    adversarial, _ = peer.run_standard_evaluation(case.x, case.y, batch_size=BATCH)
    return case.model(adversarial).argmax(1) == case.y, time.process_time() - began


@contextmanager
def in_double(norm: str) -> Iterator[None]:
    """The peer's projection onto a hyperplane in double precision."""
    name = f"projection_{norm}"
    single = getattr(fab_base, name)
    setattr(fab_base, name, lambda *given: single(*(each.double() for each in given)).float())
    try:
        yield
    finally:
        setattr(fab_base, name, single)


def steadiness(case: Case) -> None:
    """Who changes sides under FAB-T alone when every pixel moves by at most a millionth, inside the box."""
    draw = torch.rand(case.x.shape, generator=torch.Generator().manual_seed(1))
    moved = replace(case, x=torch.where(case.x < 0.5, case.x + MOVE * draw, case.x - MOVE * draw))
    mine = [fab(c.model, c.x, c.y, c.threat, batch_size=BATCH).correct for c in (case, moved)]
    peer = [theirs(c, ("fab-t",))[0] for c in (case, moved)]
    with in_double(case.threat.norm):
        exact, _ = theirs(case, ("fab-t",))
    counts = [int((one ^ other).sum()) for one, other in (mine, peer, (mine[0], peer[0]), (mine[0], exact))]
    print(
        f"  {case.name:<6} {case.threat.norm:<4} FAB-T alone, pixels moved by {MOVE:g}: of {len(case.x)} images "
        f"{counts[0]} change sides, {counts[1]} (pyautoattack); {counts[2]} differ between the two, {counts[3]} when "
        "pyautoattack projects in double precision",
        flush=True,
    )


def compare(case: Case) -> None:
    (mine, my_seconds), (reference, seconds) = ours(case), theirs(case)
    words = [
        f"  {case.name:<6} {case.threat.norm:<4} eps {case.threat.eps:<5g} {len(case.x)} images",
        f"standing {int(mine.sum())} and {int(reference.sum())} (pyautoattack)",
        f"{int((mine & ~reference).sum())} and {int((~mine & reference).sum())} under that one alone",
        f"seconds {my_seconds:.1f} and {seconds:.1f}, ratio {my_seconds / seconds:.2f}",
    ]
    if case.robust is not None:
        wrong, wrong_reference = (int((found != case.robust).sum()) for found in (mine, reference))
        words.append(f"mismatches with the closed form {wrong} and {wrong_reference}")
    print("   ".join(words), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases():
            compare(case)
            if case.name == "mnist":
                steadiness(case)


if __name__ == "__main__":
    main()
