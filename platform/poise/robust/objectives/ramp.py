"""RAMP: the worse of two threats, and predictions that agree under both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.robust.attacks import cross_entropy
from poise.robust.attacks.losses import divergence
from poise.robust.objectives.base import ObjectiveInput, ObjectiveOutput, make_output
from poise.robust.objectives.norms import logits_of, share_of_worst

__all__ = ["ramp"]


def ramp(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """mean_i max_p l_{p,i} + lambda (1/|S|) sum_{i in S} KL(p_i(x_1) || p_i(x_2)) (RAMP, Jiang and Singh, 2024).

    x_1 and x_2 are the adversarial examples of the two threats in their order (linf before l1), S the examples
    classified right at x_1; gradients flow through both predictions. The worse threat is chosen by the training
    forwards themselves, as in `norms.max`. Every rank has its own S. With `options.projection` the epochs 0, 2, ...
    are natural, mean_i CE(f(x_i), y_i), and `projection.GradientProjection` joins each to the one after it. Source:
    papers/adversarial.md, section 3.
    """
    if inputs.options.projection is not None and inputs.epoch % 2 == 0:
        return _natural(model, x, y, inputs)
    logits_1, logits_2 = logits_of(model, x, y, inputs)  # (N, K) each
    losses = torch.stack([cross_entropy(logits_1, y), cross_entropy(logits_2, y)])  # (2, N)
    correct = torch.stack([logits_1.detach().argmax(1) == y, logits_2.detach().argmax(1) == y])  # (2, N)
    worst = losses.max(dim=0)  # over the threats: values and indices (N,)
    in_s = correct[0]
    pairing = (divergence(logits_1, logits_2) * in_s).sum()
    loss = worst.values.mean() + float(inputs.options.kl_weight) * pairing / in_s.sum().clamp(min=1)
    shares = share_of_worst(worst.indices, losses)
    return make_output(inputs, loss, losses, correct, tuple(inputs.attacks), shares)


def _natural(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """The clean loss of a natural epoch, with the metrics "loss/clean" and "clean"."""
    logits = model(x.clone())  # (N, K); a model may change its input, which is the caller's here
    losses = cross_entropy(logits, y)  # (N,)
    correct = logits.detach().argmax(1) == y
    one = losses.new_ones(1)
    output = make_output(inputs, losses.mean(), losses.unsqueeze(0), correct.unsqueeze(0), ("clean",), one)
    metrics = {"loss/clean": output.metrics["loss/clean"], "clean": output.metrics["robust/clean"]}
    return ObjectiveOutput(output.loss, metrics, output.state)
