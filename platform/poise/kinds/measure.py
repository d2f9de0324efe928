"""Robust accuracy over the gang: every rank attacks its share of the examples, every rank learns the whole result."""

from __future__ import annotations

import torch
from torch import nn

from poise.data.sets import ImageSet, unit_pixels
from poise.kinds.attacks import bound
from poise.robust.attacks import SEARCH
from poise.robust.evaluate import Evaluation, evaluate
from poise.robust.spec import Threats, ThreatSpec
from poise.robust.threats import Threat
from poise.train.context import Context

__all__ = ["described", "robust_accuracy"]


def robust_accuracy(
    model: nn.Module, images: ImageSet, threats: Threats, *, batch_size: int, seed: int, context: Context
) -> Evaluation:
    """Attack `model` on `images` under each threat.

    The noise of an example depends on `seed` and its index alone, so the result is the same on any number of ranks. All
    ranks call this together and get the same evaluation, its rows in the order of `images`.
    """
    mine = torch.arange(context.rank, len(images), context.world_size)
    share = images.select(mine)
    evaluation = evaluate(
        model,
        unit_pixels(share.images.to(context.device)),
        share.labels.to(context.device),
        {norm: bound(SEARCH[each.attack], Threat(norm, each.eps), **each.options()) for norm, each in threats.items()},
        batch_size=batch_size,
        seed=seed,
        indices=mine,
    )
    correct = torch.empty(len(images), len(evaluation.names), dtype=torch.bool)
    for rank, part in enumerate(context.gather(evaluation.correct)):
        correct[rank :: context.world_size] = part
    return Evaluation(evaluation.names, correct)


def described(threats: Threats) -> dict[str, str]:
    """Each attack in words, for tables and pages."""
    return {norm: _words(threat) for norm, threat in threats.items()}


def _words(threat: ThreatSpec) -> str:
    runs = f"{threat.restarts} run{'s' if threat.restarts > 1 else ''}"
    if threat.attack == "apgd":
        return f"APGD-{threat.steps}, eps {threat.eps}, {runs}"
    step = "decaying steps" if threat.step_size is None else f"step {threat.step_size}"
    return f"PGD-{threat.steps}, eps {threat.eps}, {step}, {runs}"
