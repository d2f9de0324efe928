"""ADT: adversarial training with adaptive weights on the threats (arXiv 2210.00557)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from poise.robust.objectives.base import Objective, ObjectiveContext, ObjectiveOutput, Points, State
from poise.robust.objectives.forward import losses_at, make_output
from poise.robust.spec import NORMS, Threats
from poise.spec import ExactNumber

__all__ = ["Adt", "adt_weights"]


class Adt(Objective):
    """Adversarial training with adaptive weights on the threats (ADT, arXiv 2210.00557; its public code).

    sum_p w_p l_p, where the weights adapt and are constants for the gradient. With b_p = 1 / max(l_p, floor),
    `inverse_loss` has w_p = b_p / sum_q b_q and `proportional_loss` has w_p = l_p / sum_q l_q. With lag 1 a batch is
    weighed by the losses of the batch before it (uniformly at first, and again at the start of each epoch if reset is
    "epoch"); with lag 0 by its own losses.

    `smoothness` is this project's own proposal, not the paper's: w_p is proportional to 1 / eta_p, where eta_p is the
    moving average of ||grad l_p(theta_{t+1}) - grad l_p(theta_t)||, which includes the change from batch to batch.
    The weights are uniform until there is a first difference. It takes one more parameter gradient per threat, and
    keeps it in the state (P x parameters).
    """

    name: Literal["adt"] = Field(default="adt", description="weighted sum of the threats' losses, weights adapted")
    weighting: Literal["inverse_loss", "proportional_loss", "smoothness", "uniform", "official_slip"] = Field(
        default="inverse_loss",
        description="rule of the weights; official_slip repeats a slip of the authors' code, for replication only",
    )
    lag: Literal[0, 1] = Field(
        default=1, description="1: weigh a batch by the losses of the batch before it; 0: by its own losses"
    )
    reset: Literal["epoch", "never"] = Field(default="epoch", description="when the weights go back to uniform")
    floor: Annotated[ExactNumber, Field(gt=0, le=1)] = Field(
        default=ExactNumber("1e-6"),
        description="losses (or roughnesses) below this count as this when weights are computed",
    )
    smoothness_decay: Annotated[ExactNumber, Field(ge=0, lt=1)] = Field(
        default=ExactNumber("0.9"), description="smoothness only: decay of the moving average of the roughness"
    )

    def check(self, threats: Threats) -> None:
        """All three norms where the weighting is defined for these only."""
        if self.weighting == "official_slip" and len(threats) != len(NORMS):
            raise ValueError(
                "weighting `official_slip` is defined for the three threats linf, l2 and l1: give all three"
            )

    def initial_state(self, norms: Sequence[str]) -> State:
        """Uniform weights (P,) in the order of `norms`."""
        state = {"weights": torch.full((len(norms),), 1 / len(norms))}
        if self.weighting == "smoothness":
            state["roughness"] = torch.zeros(len(norms))
        return state

    def loss(self, points: Points, context: ObjectiveContext) -> ObjectiveOutput:
        """The weighted sum of l_p, and the weights that the next batch begins with."""
        norms = tuple(points)
        state = context.state
        if context.first_in_epoch and self.reset == "epoch":
            state = self.initial_state(norms)
        losses, correct = losses_at(points, context)  # (P, N) each
        per_threat = losses.mean(1)  # (P,)
        next_state = self._adapt(per_threat, state, context)
        weights_from = next_state if self.lag == 0 else state
        weights = weights_from["weights"].to(per_threat)  # (P,), without gradient
        loss = (weights * per_threat).sum()
        return make_output(context, loss, losses, correct, norms, weights, next_state)

    def _adapt(self, per_threat: Tensor, state: State, context: ObjectiveContext) -> State:
        """The state after a batch with the mean losses `per_threat` (P,), the same on every rank."""
        norms = tuple(context.attacks)
        floor = float(self.floor)
        if self.weighting != "smoothness":
            mean_losses = context.mean(per_threat.detach())
            return {"weights": adt_weights(mean_losses, self.weighting, norms, floor)}
        gradients = context.mean(_parameter_gradients(context.model, per_threat))  # (P, parameters)
        roughness = state["roughness"].to(per_threat)  # (P,)
        decay = float(self.smoothness_decay)
        if "gradients" in state:
            difference = gradients - state["gradients"].to(gradients)
            change = torch.linalg.vector_norm(difference, dim=1).to(per_threat)  # (P,)
            average = decay * roughness + (1 - decay) * change
            # a roughness of 0 has not been measured yet: the first change is taken as it is, not averaged with 0
            roughness = torch.where(roughness > 0, average, change)
        weights = adt_weights(roughness, self.weighting, norms, floor)
        return {"weights": weights, "roughness": roughness, "gradients": gradients}


def adt_weights(scores: Tensor, weighting: str, norms: tuple[str, ...], floor: float = 1e-6) -> Tensor:
    """Weights (P,) from positive scores (P,): losses, or for `smoothness` roughnesses. They sum to one.

    Except with `official_slip`: the public code computes the inverse-loss weights, then writes that of linf over that
    of l1, and linf keeps 1/3 for ever (losses (4, 2, 1) for linf, l2, l1 give (1/3, 2/7, 1/7), sum 16/21).
    """
    scores = scores.clamp(min=floor)
    if weighting == "uniform":
        scores = torch.ones_like(scores)
    elif weighting != "proportional_loss":
        scores = 1 / scores
    weights = scores / scores.sum()
    if weighting == "official_slip":
        by_norm = dict(zip(norms, weights, strict=True))
        by_norm["l1"] = by_norm["linf"]
        by_norm["linf"] = torch.full_like(weights[0], 1 / 3)
        weights = torch.stack([by_norm[norm] for norm in norms])
    return weights


def _parameter_gradients(model: nn.Module, losses: Tensor) -> Tensor:
    """Parameter gradients (P, number of parameters) of `losses` (P,), whose graph is kept."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten().float() for gradient in gradients]))
    return torch.stack(rows)
