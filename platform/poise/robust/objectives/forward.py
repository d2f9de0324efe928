"""Training forwards at the points of a batch, and the output that follows from their losses.

Notation, here and in the objectives: theta are the parameters, p a threat, P the number of threats, l_p(theta) the mean
cross entropy of a batch at its adversarial examples for p.

Each threat has a training forward of its own, in the mode that the model is in (train, in training), so that BN
normalises each threat by its own statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks import cross_entropy
from poise.robust.objectives.base import ObjectiveContext, ObjectiveOutput, Points, State
from poise.user_code import MethodOutputError

__all__ = [
    "losses_at",
    "make_output",
    "output_at_one_threat",
    "output_at_shared_points",
    "share_of_worst",
]


def losses_at(points: Points, context: ObjectiveContext) -> tuple[Tensor, Tensor]:
    """Cross entropies (P, N) with their graph, and which adversarial examples are classified right, bool (P, N)."""
    logits = [context.model(point) for point in points.values()]  # P times (N, K)
    losses = torch.stack([cross_entropy(scores, context.y) for scores in logits])
    correct = torch.stack([scores.detach().argmax(1) == context.y for scores in logits])
    return losses, correct


def output_at_one_threat(points: Points, context: ObjectiveContext, state: State | None = None) -> ObjectiveOutput:
    """l_p for the only threat p in `points`, out of all in `context.attacks`.

    The other threats have weight 0. With several threats there is no "robust/union": only one was attacked.
    """
    (norm,) = points
    losses, correct = losses_at(points, context)  # (1, N) each
    (loss,) = losses.mean(1)
    output = make_output(context, loss, losses, correct, (norm,), torch.ones_like(loss).view(1), state)
    metrics = output.metrics
    if len(context.attacks) > 1:
        del metrics["robust/union"]
    for other in context.attacks:
        if other != norm:
            metrics[f"weight/{other}"] = torch.zeros_like(loss)
    return output


def output_at_shared_points(points: Points, context: ObjectiveContext) -> ObjectiveOutput:
    """The mean cross entropy at points that belong to no threat alone: metrics have the only name in `points`."""
    (name,) = points
    losses, correct = losses_at(points, context)  # (1, N) each
    (loss,) = losses.mean(1)
    output = make_output(context, loss, losses, correct, (name,), torch.ones_like(loss).view(1))
    metrics = {key: output.metrics[key] for key in (f"loss/{name}", f"robust/{name}")}
    return ObjectiveOutput(loss, metrics, output.state)


def share_of_worst(worst: Tensor, losses: Tensor) -> Tensor:
    """The share of examples that each threat is the worst for, (P,), from its index `worst` (N,) and losses (P, N)."""
    return nn.functional.one_hot(worst, len(losses)).to(losses.dtype).mean(0)


def make_output(
    context: ObjectiveContext,
    loss: Tensor,
    losses: Tensor,
    correct: Tensor,
    norms: Sequence[str],
    weights: Tensor,
    state: State | None = None,
) -> ObjectiveOutput:
    """The output of a batch: `loss`, the metrics of each norm, and `state` (by default the state before the batch).

    Args:
        losses: (P, N), the losses of N examples under each of the P `norms`.
        correct: bool (P, N), which adversarial examples are classified right.
        weights: (P,), the coefficients of the norms in `loss`.

    Raises:
        MethodOutputError: an argument has another shape.
        PoiseError: a loss is not finite; the message names the example and the step.
    """
    _require_shapes(losses, correct, norms, weights)
    losses = losses.detach()
    _require_finite(losses, norms, context.step)
    metrics = {"robust/union": correct.all(0).float().mean()}
    for index, norm in enumerate(norms):
        metrics[f"loss/{norm}"] = losses[index].mean()
        metrics[f"robust/{norm}"] = correct[index].float().mean()
        metrics[f"weight/{norm}"] = weights.detach()[index]
    return ObjectiveOutput(loss, metrics, context.state if state is None else state)


def _require_shapes(losses: Tensor, correct: Tensor, norms: Sequence[str], weights: Tensor) -> None:
    if losses.ndim != 2 or len(losses) != len(norms) or correct.shape != losses.shape:
        shapes = f"losses {tuple(losses.shape)} and correct {tuple(correct.shape)}"
        raise MethodOutputError(
            f"make_output: {shapes}; both must be (P, N), for the P = {len(norms)} norms that are given"
        )
    if weights.shape != (len(norms),):
        shape = tuple(weights.shape)
        raise MethodOutputError(
            f"make_output: weights {shape}; it must be (P,), one for each of the P = {len(norms)} norms"
        )


def _require_finite(losses: Tensor, norms: Sequence[str], step: int) -> None:
    if not bool(losses.isfinite().all()):
        row, example = losses.isfinite().logical_not().nonzero()[0].tolist()
        raise PoiseError(
            f"the loss under {norms[row]} of example {example} of the batch is {losses[row, example].item()} at step "
            f"{step}: lower train.optimizer.lr, set train.clip_norm or use train.precision fp32"
        )
