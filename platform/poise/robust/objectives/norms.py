"""What multi-norm adversarial training minimises.

Notation: theta are the parameters, p a threat, l_p(theta) the mean cross entropy of a batch at its adversarial examples
for p. Sources: papers/adversarial.md, section 3.

Each objective is a function of one batch. All adversarial examples are crafted before the first training forward, so
that every threat meets the same model; then each threat has a forward of its own in the mode the model is in (train,
in training), which keeps BN statistics per threat. Under DistributedDataParallel the forwards go through the wrapper
and the attacks get the module inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from poise.robust.attacks import cross_entropy
from poise.robust.objective_spec import Adt
from poise.robust.objectives.play import Outcome, Play, State, outcome, points_of

__all__ = ["adt", "adt_weights", "at", "avg", "initial_weights", "logits_of", "losses_of", "max", "single"]


def at(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """l_p for the one threat p that is given (Madry et al., 2018)."""
    (norm,) = play.attacks
    return single(model, x, y, play, norm)


def avg(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """(1/P) sum_p l_p, one step on the joint mean (Tramer and Boneh, 2019); with `options.weights`, sum_p w_p l_p.

    In mode "sequential", as the public multi-norm codes do it, optimizer step s is one on the (s mod P)-th of the
    threats l1, l2, linf alone; whoever calls gives each batch P times, so that an attack meets the model that the step
    before it has left.
    """
    if play.options.mode == "sequential":
        return single(model, x, y, play, tuple(play.attacks)[::-1][play.step % len(play.attacks)])
    losses, correct = losses_of(model, x, y, play)
    each = losses.mean(1)
    shares: dict[str, float] = {norm: float(weight) for norm, weight in (play.options.weights or {}).items()}
    weights = torch.tensor([shares.get(norm, 1 / len(each)) for norm in play.attacks], device=x.device)
    loss = (weights * each).sum() if shares else each.mean()
    return outcome(play, loss, losses, correct, tuple(play.attacks), weights)


def max(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """(1/N) sum_i max_p l_{p,i}, the worst threat of each example (Tramer and Boneh, 2019).

    The threat is chosen by the very losses that are trained on, those of the P training forwards, not by an extra
    forward in eval mode: what is minimised is exactly the maximum, and it is never below any l_p.
    """
    losses, correct = losses_of(model, x, y, play)
    worst = losses.max(dim=0)
    shares = nn.functional.one_hot(worst.indices, len(losses)).to(losses.dtype).mean(0)
    return outcome(play, worst.values.mean(), losses, correct, tuple(play.attacks), shares)


def adt(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """sum_p w_p l_p with weights that adapt, constants for the gradient (ADT, arXiv 2210.00557; its public code).

    With b_p = 1 / max(l_p, floor), `inverse_loss` has w_p = b_p / sum_q b_q and `proportional_loss` has w_p = l_p /
    sum_q l_q. With lag 1 a batch is weighed by the losses of the batch before it (uniformly at first, and again at the
    start of each epoch if reset is "epoch"); with lag 0 by its own.

    `smoothness` is this project's own proposal, not the paper's: w_p is proportional to 1 / eta_p, where eta_p is the
    moving average of ||grad l_p(theta_{t+1}) - grad l_p(theta_t)||, successive batches included; uniform until there
    is a first difference. It takes one parameter gradient per threat more and remembers it (P x parameters in `state`).
    """
    norms, state = tuple(play.attacks), play.state
    if play.first_in_epoch and play.options.reset == "epoch":
        state = initial_weights(play.options, norms)
    losses, correct = losses_of(model, x, y, play)
    each = losses.mean(1)
    after = _adapt(model, each, state, play, norms)
    weights = (after if play.options.lag == 0 else state)["weights"].to(each)
    return outcome(play, (weights * each).sum(), losses, correct, norms, weights, after)


def initial_weights(options: Adt, norms: Sequence[str]) -> State:
    """The state of `adt` before its first batch: uniform weights (P,) in the order of `norms`."""
    state = {"weights": torch.full((len(norms),), 1 / len(norms))}
    return {**state, "roughness": torch.zeros(len(norms))} if options.weighting == "smoothness" else state


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
        by_norm |= {"l1": by_norm["linf"], "linf": torch.full_like(weights[0], 1 / 3)}
        weights = torch.stack([by_norm[norm] for norm in norms])
    return weights


def _adapt(model: nn.Module, each: Tensor, state: State, play: Play, norms: tuple[str, ...]) -> State:
    options: Adt = play.options
    if options.weighting != "smoothness":
        return {"weights": adt_weights(play.mean(each.detach()), options.weighting, norms, float(options.floor))}
    gradients = play.mean(_gradients(model, each))
    roughness, decay = state["roughness"].to(each), float(options.smoothness_decay)
    if "gradients" in state:
        change = torch.linalg.vector_norm(gradients - state["gradients"].to(gradients), dim=1).to(each)
        roughness = torch.where(roughness > 0, decay * roughness + (1 - decay) * change, change)
    weights = adt_weights(roughness, options.weighting, norms, float(options.floor))
    return {"weights": weights, "roughness": roughness, "gradients": gradients}


def _gradients(model: nn.Module, each: Tensor) -> Tensor:
    """Parameter gradients (P, number of parameters) of the losses `each` (P,), whose graph is kept."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in each]
    return torch.stack([torch.cat([grad.flatten().float() for grad in row]) for row in rows])


def single(
    model: nn.Module, x: Tensor, y: Tensor, play: Play, norm: str, state: State | None = None, **options: Any
) -> Outcome:
    """l_p for the threat `norm` out of several: the others have weight 0, and a union is not known."""
    attack = replace(play, attacks={norm: play.attacks[norm]}, together=None)
    losses, correct = losses_of(model, x, y, attack, **options)
    (loss,) = losses.mean(1)
    out = outcome(play, loss, losses, correct, (norm,), torch.ones_like(loss).view(1), state)
    if len(play.attacks) > 1:
        del out.metrics["robust/union"]
    others = {f"weight/{other}": torch.zeros_like(loss) for other in play.attacks if other != norm}
    return replace(out, metrics=out.metrics | others)


def losses_of(model: nn.Module, x: Tensor, y: Tensor, play: Play, **options: Any) -> tuple[Tensor, Tensor]:
    """Cross entropies (P, N) with their graph, and which adversarial examples are classified right, bool (P, N).

    `options` go to the attacks.
    """
    logits = logits_of(model, x, y, play, **options)
    losses = torch.stack([cross_entropy(scores, y) for scores in logits])
    return losses, torch.stack([scores.detach().argmax(1) == y for scores in logits])


def logits_of(model: nn.Module, x: Tensor, y: Tensor, play: Play, **options: Any) -> list[Tensor]:
    """Logits (N, K) at the adversarial examples of each threat, with their graph."""
    return [model(point) for point in points_of(model, x, y, play, **options)]
