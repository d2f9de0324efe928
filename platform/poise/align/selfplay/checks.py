"""The calls of a method in training, with a check of what they return: the class may be code of the user."""

from __future__ import annotations

from torch import Tensor

from poise.align.selfplay.base import PolicyBatch, SelfPlayMethod
from poise.align.selfplay.policy_loss import PolicyLoss
from poise.method_output import describe, require_loss, require_metrics
from poise.user_code import MethodOutputError, explain_method

__all__ = ["compute_advantage", "compute_policy_loss"]


def compute_advantage(method: SelfPlayMethod, preference: Tensor) -> Tensor:
    """The advantage of each rollout, see `SelfPlayMethod.advantage`.

    Raises:
        UserError: it is not (P, G) for preferences (P, G, K), or not (P, G, ...) for a method with a loss of its own.
    """
    with explain_method(method, "advantage"):
        advantage = method.advantage(preference)
        rollouts = tuple(preference.shape[:2])  # (P, G)
        has_own_loss = type(method).loss is not SelfPlayMethod.loss
        shape = tuple(advantage.shape) if isinstance(advantage, Tensor) else ()
        if shape != rollouts and not (has_own_loss and shape[:2] == rollouts):
            expected = f"(P, G) = {rollouts} for preferences (P, G, K) = {tuple(preference.shape)}"
            raise MethodOutputError(
                f"{method.name}.advantage returned {describe(advantage)}: it must return a tensor {expected}"
            )
        if advantage.requires_grad:
            raise MethodOutputError(f"{method.name}.advantage returned a tensor with a gradient: detach() it")
    return advantage


def compute_policy_loss(method: SelfPlayMethod, batch: PolicyBatch) -> PolicyLoss:
    """The loss of each response, see `SelfPlayMethod.loss`.

    Raises:
        UserError: the method returned no PolicyLoss, or one whose loss is not (N,) with a gradient, or whose metrics
            are not detached scalars.
    """
    with explain_method(method, "loss"):
        output = method.loss(batch)
        if not isinstance(output, PolicyLoss):
            raise MethodOutputError(f"{method.name}.loss returned {describe(output)}: it must return a PolicyLoss")
        require_loss(f"{method.name}.loss: PolicyLoss.loss", output.loss, (len(batch.responses.ids),))
        require_metrics(f"{method.name}.loss: PolicyLoss.metrics", output.metrics)
    return output
