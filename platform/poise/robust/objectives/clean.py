"""What TRADES and MART share: two training forwards, at the images and at the adversarial examples of one threat.

Attacks run in eval mode. Both training forwards run in the mode that the model is in, and gradients flow through both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from poise.robust.attacks import cross_entropy
from poise.robust.objectives.base import ObjectiveContext, ObjectiveOutput, Points
from poise.robust.objectives.forward import make_output
from poise.robust.spec import Threats
from poise.spec import ExactNumber

__all__ = ["Spread", "check_spread", "output_at_clean_and_attacked", "start_options"]

Spread = Annotated[
    Annotated[ExactNumber, Field(gt=0, le=1)] | None,
    Field(description="standard deviation of the normal noise that the attack starts with; null: as the threat says"),
]


def check_spread(spread: ExactNumber | None, threats: Threats) -> None:
    """Raise `ValueError` where the attack of a threat cannot start with this spread."""
    for norm, threat in threats.items():
        if threat.attack == "apgd" and spread is not None:
            raise ValueError(f"a spread is for pgd: set objective.spread: null, or remove threats.{norm}.attack")


def start_options(spread: ExactNumber | None) -> dict[str, Any]:
    """The arguments of the attack that say where it starts."""
    return {} if spread is None else {"spread": float(spread)}


def output_at_clean_and_attacked(
    points: Points,
    context: ObjectiveContext,
    losses_of: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    beta: float,
) -> ObjectiveOutput:
    """The mean of losses_of(logits at x, logits at x', y, beta), with the usual metrics at x' and the accuracy "clean".

    `losses_of` gives the loss of each example (N,) from logits (N, K).
    """
    ((norm, adversarial),) = points.items()
    clean = context.model(context.x.clone())  # (N, K); the copy because a model may change its input
    attacked = context.model(adversarial)  # (N, K)
    losses = losses_of(clean, attacked, context.y, beta)  # (N,)
    correct = attacked.detach().argmax(1) == context.y
    attacked_losses = cross_entropy(attacked, context.y)
    output = make_output(
        context,
        losses.mean(),
        attacked_losses.unsqueeze(0),
        correct.unsqueeze(0),
        (norm,),
        torch.ones(1, device=context.x.device),
    )
    output.metrics["clean"] = (clean.detach().argmax(1) == context.y).float().mean()
    return output
