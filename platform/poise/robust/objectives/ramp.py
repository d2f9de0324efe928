"""RAMP: the worse of two threats, and predictions that agree under both (Jiang and Singh, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from poise.robust.attacks import cross_entropy
from poise.robust.attacks.losses import divergence
from poise.robust.objectives.base import (
    AfterStep,
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
    Points,
    craft_all,
)
from poise.robust.objectives.forward import make_output, share_of_worst
from poise.robust.objectives.projection import GradientProjection
from poise.robust.spec import Threats
from poise.spec import ExactNumber

__all__ = ["Ramp"]


class Ramp(Objective):
    """Adversarial training on the worse of two threats, plus the divergence between their predictions.

    mean_i max_p l_{p,i} + lambda (1/|S|) sum_{i in S} KL(p_i(x_1) || p_i(x_2)) (RAMP, Jiang and Singh, 2024). x_1 and
    x_2 are the adversarial examples of the two threats in their order (linf before l1), S the examples classified right
    at x_1; gradients flow through both predictions. The worse threat is chosen by the training forwards themselves, as
    in `Max`. Every rank has its own S. With `projection` the epochs 0, 2, ... are natural, mean_i CE(f(x_i), y_i), and
    `GradientProjection` joins each to the one after it.
    """

    name: Literal["ramp"] = Field(
        default="ramp", description="worse loss of two threats plus the divergence between their predictions"
    )
    kl_weight: Annotated[ExactNumber, Field(ge=0, le=1_000)] = Field(
        default=ExactNumber("5"), description="weight of the divergence; for fine-tuning 1.5"
    )
    projection: Annotated[ExactNumber, Field(ge=0, le=1)] | None = Field(
        default=ExactNumber("1/2"),
        description="weight of natural training in the update: natural and adversarial epochs alternate, from the "
        "same weights; null: every epoch is adversarial",
    )

    def check(self, threats: Threats) -> None:
        """Exactly two threats."""
        if len(threats) != 2:
            norms = ", ".join(threats.keys())
            raise ValueError(
                f"objective `ramp` pairs exactly two threats and {len(threats)} are given ({norms}): give linf and l1, "
                "which between them cover l2"
            )

    def gradients_per_batch(self, threats: Threats) -> int:
        """As by default; half of it where natural epochs alternate with adversarial ones."""
        gradients = super().gradients_per_batch(threats)
        return gradients if self.projection is None else round(gradients / 2)

    @property
    def training_metrics(self) -> Sequence[str]:
        """With a projection, the clean loss of natural epochs."""
        return () if self.projection is None else ("loss/clean",)

    @property
    def copies_of_model(self) -> int:
        """With a projection, the weights that both epochs start from and those of the natural one."""
        return 0 if self.projection is None else 2

    def after_step(self, model: nn.Module, steps_per_epoch: int) -> AfterStep | None:
        """With a projection, the join of natural and adversarial epochs."""
        if self.projection is None:
            return None
        return GradientProjection(model, float(self.projection), steps_per_epoch)

    def craft(self, context: ObjectiveContext) -> Points:
        """The adversarial examples of both threats; none in a natural epoch."""
        return {} if self._is_natural(context) else craft_all(context)

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The worse loss plus the weighted divergence, or the clean loss of a natural epoch."""
        if self._is_natural(context):
            return _natural(context)
        logits_1, logits_2 = [context.model(point) for point in points.values()]  # (N, K) each
        losses = torch.stack([cross_entropy(logits_1, context.y), cross_entropy(logits_2, context.y)])  # (2, N)
        right_1 = logits_1.detach().argmax(1) == context.y
        right_2 = logits_2.detach().argmax(1) == context.y
        worst = losses.max(dim=0)  # over the threats: values and indices (N,)
        pairing = (divergence(logits_1, logits_2) * right_1).sum()
        loss = worst.values.mean() + float(self.kl_weight) * pairing / right_1.sum().clamp(min=1)
        shares = share_of_worst(worst.indices, losses)
        return make_output(context, loss, losses, torch.stack([right_1, right_2]), tuple(points), shares)

    def _is_natural(self, context: ObjectiveContext) -> bool:
        """Whether the batch belongs to an epoch without attacks."""
        return self.projection is not None and context.epoch % 2 == 0


def _natural(context: ObjectiveContext) -> ObjectiveOutput:
    """The clean loss of a natural epoch, with the metrics "loss/clean" and "clean"."""
    logits = context.model(context.x.clone())  # (N, K); the copy because a model may change its input
    losses = cross_entropy(logits, context.y)  # (N,)
    correct = logits.detach().argmax(1) == context.y
    one = losses.new_ones(1)
    output = make_output(context, losses.mean(), losses.unsqueeze(0), correct.unsqueeze(0), ("clean",), one)
    metrics = {"loss/clean": output.metrics["loss/clean"], "clean": output.metrics["robust/clean"]}
    return ObjectiveOutput(output.loss, metrics, output.state)
