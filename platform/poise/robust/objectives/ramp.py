"""RAMP: the worse of two threats, and predictions that agree under both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.robust.attacks import cross_entropy
from poise.robust.attacks.losses import divergence
from poise.robust.objectives.norms import logits_of
from poise.robust.objectives.play import Outcome, Play, outcome

__all__ = ["ramp"]


def ramp(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """mean_i max_p l_{p,i} + lambda (1/|S|) sum_{i in S} KL(p_i(x_1) || p_i(x_2)) (RAMP, Jiang and Singh, 2024).

    x_1 and x_2 are the adversarial examples of the two threats in their order (linf before l1), S the examples
    classified right at x_1; gradients flow through both predictions. The worse threat is chosen by the training
    forwards themselves, as in `norms.max`. Every rank has its own S. With `options.projection` the epochs 0, 2, ...
    are natural, mean_i CE(f(x_i), y_i), and `projection.GradientProjection` joins each to the one after it. Source:
    papers/adversarial.md, section 3.
    """
    if play.options.projection is not None and play.epoch % 2 == 0:
        return _natural(model, x, y, play)
    logits = logits_of(model, x, y, play)
    losses, correct = (torch.stack(rows) for rows in zip(*(_judged(scores, y) for scores in logits), strict=True))
    worst = losses.max(dim=0)
    paired = divergence(*logits) * correct[0]
    loss = worst.values.mean() + float(play.options.pairing) * paired.sum() / correct[0].sum().clamp(min=1)
    shares = nn.functional.one_hot(worst.indices, len(losses)).to(losses.dtype).mean(0)
    return outcome(play, loss, losses, correct, tuple(play.attacks), shares)


def _natural(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    losses, correct = _judged(model(x.clone()), y)
    out = outcome(play, losses.mean(), losses.unsqueeze(0), correct.unsqueeze(0), ("clean",), losses.new_ones(1))
    return Outcome(out.loss, {"loss/clean": out.metrics["loss/clean"], "clean": out.metrics["robust/clean"]}, out.state)


def _judged(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(logits, y), logits.detach().argmax(1) == y
