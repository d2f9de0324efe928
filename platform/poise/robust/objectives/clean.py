"""Objectives that weigh the clean prediction against the attacked one: TRADES and MART.

x' is the adversarial example of the one threat that is given, p(x) the softmax of the model at x. Attacks run in eval
mode; both training forwards run in the mode the model is in, and gradients flow through both. Source:
papers/adversarial.md, section 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.robust.attacks import attack_mode, cross_entropy, kl_from
from poise.robust.attacks.contract import scores
from poise.robust.attacks.losses import divergence, wide
from poise.robust.objectives.play import Outcome, Play, bare, outcome

__all__ = ["mart", "mart_losses", "trades", "trades_losses"]


def trades(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """CE(f(x), y) + beta KL(p(x) || p(x')), x' climbing that very divergence (TRADES, Zhang et al., 2019).

    The attack needs a start beside x, where the gradient of the divergence is exactly zero: `options.spread`.
    """
    (attack,), inner = play.attacks.values(), bare(model)
    with attack_mode(inner):
        reference = scores(inner, x)
    point = attack(inner, x, y, loss=kl_from(reference), **_start(play))
    return _trained(model, x, point, y, play, trades_losses)


def trades_losses(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """The loss of each example (N,) from logits (N, K) at x and x'."""
    return cross_entropy(clean, y) + beta * divergence(clean, attacked)


def mart(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """(1/N) sum_i BCE(p_i(x')) + beta KL(p_i(x) || p_i(x')) (1 - p_{i,y}(x)), x' climbing CE (MART, Wang et al., 2020).

    BCE(p) = -log p_y - log(1.0001 - max_{k != y} p_k).
    """
    (attack,) = play.attacks.values()
    return _trained(model, x, attack(bare(model), x, y, **_start(play)), y, play, mart_losses)


def mart_losses(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """The loss of each example (N,) from logits (N, K) at x and x'."""
    other = functional.softmax(wide(attacked), dim=1).scatter(1, y.unsqueeze(1), 0).amax(1)
    boosted = cross_entropy(attacked, y) - torch.log(1.0001 - other)
    return boosted - beta * divergence(clean, attacked) * torch.expm1(-cross_entropy(clean, y))


def _start(play: Play) -> dict[str, Any]:
    return {} if play.options.spread is None else {"spread": float(play.options.spread)}


def _trained(model: nn.Module, x: Tensor, point: Tensor, y: Tensor, play: Play, losses: Any) -> Outcome:
    """The mean of `losses` and, of the attacked branch, the usual metrics; "clean" is the accuracy at x."""
    clean, attacked = model(x.clone()), model(point)  # a model may change its input, which is the caller's here
    each = losses(clean, attacked, y, float(play.options.beta))
    correct = (attacked.detach().argmax(1) == y).unsqueeze(0)
    own = cross_entropy(attacked, y).unsqueeze(0)
    out = outcome(play, each.mean(), own, correct, tuple(play.attacks), torch.ones(1, device=x.device))
    out.metrics["clean"] = (clean.detach().argmax(1) == y).float().mean()
    return out
