"""TRADES: the clean loss plus the largest divergence from the clean prediction (Zhang et al., 2019)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from poise.robust.attacks import attack_mode, cross_entropy, kl_from
from poise.robust.attacks.base import scores
from poise.robust.attacks.losses import divergence
from poise.robust.objectives.base import (
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    craft_one,
    require_one_threat,
    unwrap,
)
from poise.robust.objectives.clean import Spread, check_spread, output_at_clean_and_attacked, start_options
from poise.robust.spec import Threats
from poise.spec import ExactNumber

__all__ = ["Trades", "trades_losses"]


class Trades(Objective):
    """Clean loss plus the largest divergence from the clean prediction (TRADES, Zhang et al., 2019).

    CE(f(x), y) + beta KL(p(x) || p(x')), where p(x) is the softmax of the model at x, and x' maximises the same
    divergence. At x itself the gradient of the divergence is exactly zero, so the attack starts beside x: `spread`.
    """

    name: Literal["trades"] = Field(
        default="trades", description="clean loss plus beta times the divergence under attack"
    )
    beta: Annotated[ExactNumber, Field(ge=0, le=1_000)] = Field(
        default=ExactNumber("6"), description="weight of the divergence"
    )
    spread: Spread = ExactNumber("0.001")

    def check(self, threats: Threats) -> None:
        """Exactly one threat, whose attack does not start at the image."""
        require_one_threat(self.name, threats)
        check_spread(self.spread, threats)
        for norm, threat in threats.items():
            if self.spread is None and not threat.starts_at_random:
                raise ValueError(
                    "the attack of `trades` would stay at the image, where the divergence has no gradient: "
                    f"give objective.spread, or set threats.{norm}.random_start: true"
                )

    def losses_per_batch(self, threats: Threats) -> int:
        """One at the images and one at the adversarial examples."""
        return 2

    def craft(self, context: ObjectiveContext) -> Points:
        """Points of the only threat that maximise the divergence from the prediction at x in eval mode."""
        (norm,) = context.attacks
        inner = unwrap(context.model)
        with attack_mode(inner):
            clean_logits = scores(inner, context.x)  # (N, K), the fixed reference of the attack
        return craft_one(context, norm, loss=kl_from(clean_logits), **start_options(self.spread))

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The mean of `trades_losses`."""
        return output_at_clean_and_attacked(points, context, trades_losses, float(self.beta))


def trades_losses(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """The loss of each example (N,) from logits (N, K) at x and x'."""
    return cross_entropy(clean, y) + beta * divergence(clean, attacked)
