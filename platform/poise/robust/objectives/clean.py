"""Objectives that weigh the clean prediction against the attacked one: TRADES and MART.

x' is the adversarial example of the only threat, p(x) the softmax of the model at x. Attacks run in eval mode. Both
training forwards run in the mode that the model is in, and gradients flow through both. Source:
papers/adversarial.md, section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.robust.attacks import attack_mode, cross_entropy, kl_from
from poise.robust.attacks.base import scores
from poise.robust.attacks.losses import divergence, wide
from poise.robust.objectives.base import ObjectiveInput, ObjectiveOutput, make_output, unwrap

__all__ = ["mart", "mart_losses", "trades", "trades_losses"]


def trades(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """CE(f(x), y) + beta KL(p(x) || p(x')), x' maximising the same divergence (TRADES, Zhang et al., 2019).

    At x itself the gradient of the divergence is exactly zero, so the attack starts beside x: `options.spread`.
    """
    (attack,) = inputs.attacks.values()
    inner = unwrap(model)
    with attack_mode(inner):
        clean_logits = scores(inner, x)  # (N, K), the fixed reference of the attack
    adversarial = attack(inner, x, y, loss=kl_from(clean_logits), **_start_options(inputs))
    return _two_forwards(model, x, adversarial, y, inputs, trades_losses)


def trades_losses(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """The loss of each example (N,) from logits (N, K) at x and x'."""
    return cross_entropy(clean, y) + beta * divergence(clean, attacked)


def mart(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """(1/N) sum_i BCE(p_i(x')) + beta KL(p_i(x) || p_i(x')) (1 - p_{i,y}(x)), for x' that maximises CE.

    BCE(p) = -log p_y - log(1.0001 - max_{k != y} p_k). Source: MART, Wang et al., 2020.
    """
    (attack,) = inputs.attacks.values()
    adversarial = attack(unwrap(model), x, y, **_start_options(inputs))
    return _two_forwards(model, x, adversarial, y, inputs, mart_losses)


def mart_losses(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """The loss of each example (N,) from logits (N, K) at x and x'."""
    probabilities = functional.softmax(wide(attacked), dim=1)  # (N, K)
    largest_other = probabilities.scatter(1, y.unsqueeze(1), 0).amax(1)  # (N,), max_{k != y} p_k(x')
    boosted = cross_entropy(attacked, y) - torch.log(1.0001 - largest_other)
    # expm1(-CE) = p_y - 1, so that 1 - p_y keeps its digits where p_y is close to 1
    return boosted - beta * divergence(clean, attacked) * torch.expm1(-cross_entropy(clean, y))


def _start_options(inputs: ObjectiveInput) -> dict[str, Any]:
    """The arguments of the attack that say where it starts."""
    return {} if inputs.options.spread is None else {"spread": float(inputs.options.spread)}


def _two_forwards(
    model: nn.Module,
    x: Tensor,
    adversarial: Tensor,
    y: Tensor,
    inputs: ObjectiveInput,
    losses_of: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> ObjectiveOutput:
    """The mean of `losses_of` at x and x', with the usual metrics at x'; "clean" is the accuracy at x."""
    clean = model(x.clone())  # (N, K); the copy because a model may change its input, which is the caller's here
    attacked = model(adversarial)  # (N, K)
    losses = losses_of(clean, attacked, y, float(inputs.options.beta))  # (N,)
    correct = attacked.detach().argmax(1) == y
    attacked_losses = cross_entropy(attacked, y)
    output = make_output(
        inputs,
        losses.mean(),
        attacked_losses.unsqueeze(0),
        correct.unsqueeze(0),
        tuple(inputs.attacks),
        torch.ones(1, device=x.device),
    )
    output.metrics["clean"] = (clean.detach().argmax(1) == y).float().mean()
    return output
