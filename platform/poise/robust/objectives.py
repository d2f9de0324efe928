"""What multi-norm adversarial training minimises.

Notation: theta are the parameters, p a threat, l_p(theta) the mean cross entropy of a batch at its adversarial examples
for p. Sources: papers/adversarial.md, section 3.

Each objective is a function of one batch. All adversarial examples are crafted before the first training forward, so
that every threat meets the same model; then each threat has a forward of its own in the mode the model is in (train,
in training), which keeps BN statistics per threat. Under DistributedDataParallel the forwards go through the wrapper
and the attacks get the module inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.robust.attacks import cross_entropy
from poise.robust.spec import Adt, At, Avg, Max

__all__ = [
    "OBJECTIVES",
    "Attack",
    "Objective",
    "Outcome",
    "State",
    "adt",
    "adt_weights",
    "at",
    "avg",
    "initial_state",
    "max",
]

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, x, y) -> adversarial examples like x, detached; `perturb` with its threat and options bound."""

State = dict[str, Tensor]
"""What an objective remembers from batch to batch; belongs in checkpoints, and is the same on every rank."""


@dataclass(frozen=True)
class Outcome:
    """One batch: the scalar `loss` to step on, detached scalar metrics of this rank, and the state for the next batch.

    Metrics are "loss/<norm>", "robust/<norm>" (training accuracy at its adversarial examples), "robust/union" and
    "weight/<norm>" (the coefficient of the threat in the loss; for `max` the share of examples that it was worst for).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    state: State


Objective = Callable[..., Outcome]
"""Called as `adt` is."""


def _identity(values: Tensor) -> Tensor:
    return values


def at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    state: State,
    options: At,
    *,
    first_in_epoch: bool = False,
    mean: Callable[[Tensor], Tensor] = _identity,
) -> Outcome:
    """l_p for the one threat p that is given (Madry et al., 2018)."""
    losses, correct = _losses(model, x, y, attacks)
    (loss,) = losses.mean(1)
    return _outcome(loss, losses, correct, tuple(attacks), torch.ones_like(loss).view(1), state)


def avg(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    state: State,
    options: Avg,
    *,
    first_in_epoch: bool = False,
    mean: Callable[[Tensor], Tensor] = _identity,
) -> Outcome:
    """(1/P) sum_p l_p, one step on the joint mean (Tramer and Boneh, 2019); with `options.weights`, sum_p w_p l_p."""
    losses, correct = _losses(model, x, y, attacks)
    each = losses.mean(1)
    shares: dict[str, float] = {norm: float(weight) for norm, weight in (options.weights or {}).items()}
    weights = torch.tensor([shares.get(norm, 1 / len(each)) for norm in attacks], device=x.device)
    loss = (weights * each).sum() if shares else each.mean()
    return _outcome(loss, losses, correct, tuple(attacks), weights, state)


def max(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    state: State,
    options: Max,
    *,
    first_in_epoch: bool = False,
    mean: Callable[[Tensor], Tensor] = _identity,
) -> Outcome:
    """(1/N) sum_i max_p l_{p,i}, the worst threat of each example (Tramer and Boneh, 2019).

    The threat is chosen by the very losses that are trained on, those of the P training forwards, not by an extra
    forward in eval mode: what is minimised is exactly the maximum, and it is never below any l_p.
    """
    losses, correct = _losses(model, x, y, attacks)
    worst = losses.max(dim=0)
    shares = nn.functional.one_hot(worst.indices, len(losses)).to(losses.dtype).mean(0)
    return _outcome(worst.values.mean(), losses, correct, tuple(attacks), shares, state)


def adt(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    state: State,
    options: Adt,
    *,
    first_in_epoch: bool = False,
    mean: Callable[[Tensor], Tensor] = _identity,
) -> Outcome:
    """sum_p w_p l_p with weights that adapt, constants for the gradient (ADT, arXiv 2210.00557; its public code).

    With b_p = 1 / max(l_p, floor), `inverse_loss` has w_p = b_p / sum_q b_q and `proportional_loss` has w_p = l_p /
    sum_q l_q. With lag 1 a batch is weighed by the losses of the batch before it (uniformly at first, and again at the
    start of each epoch if reset is "epoch"); with lag 0 by its own.

    `smoothness` is this project's own proposal, not the paper's: w_p is proportional to 1 / eta_p, where eta_p is the
    moving average of ||grad l_p(theta_{t+1}) - grad l_p(theta_t)||, successive batches included; uniform until there
    is a first difference. It takes one parameter gradient per threat more and remembers it (P x parameters in `state`).

    Args:
        model: (N, ...) to logits (N, K), in train mode; may be a DistributedDataParallel wrapper.
        x, y: images (N, ...) in [0, 1]; labels (N,) int64.
        attacks: by norm, in the order linf, l2, l1.
        state: from `initial_state` or from the last `Outcome`.
        mean: averages a tensor over ranks, so that every rank has the same weights.
    """
    norms = tuple(attacks)
    if first_in_epoch and options.reset == "epoch":
        state = initial_state(options, norms)
    losses, correct = _losses(model, x, y, attacks)
    each = losses.mean(1)
    after = _adapt(model, each, state, options, norms, mean)
    weights = (after if options.lag == 0 else state)["weights"].to(each)
    return _outcome((weights * each).sum(), losses, correct, norms, weights, after)


OBJECTIVES: dict[str, Objective] = {"at": at, "avg": avg, "max": max, "adt": adt}


def initial_state(options: At | Avg | Max | Adt, norms: tuple[str, ...]) -> State:
    """The state before the first batch: nothing, or for `adt` uniform weights (P,) in the order of `norms`."""
    if not isinstance(options, Adt):
        return {}
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


def _adapt(
    model: nn.Module,
    each: Tensor,
    state: State,
    options: Adt,
    norms: tuple[str, ...],
    mean: Callable[[Tensor], Tensor],
) -> State:
    if options.weighting != "smoothness":
        return {"weights": adt_weights(mean(each.detach()), options.weighting, norms, float(options.floor))}
    gradients = mean(_gradients(model, each))
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


def _losses(model: nn.Module, x: Tensor, y: Tensor, attacks: Mapping[str, Attack]) -> tuple[Tensor, Tensor]:
    """Cross entropies (P, N) with their graph, and which adversarial examples are classified right, bool (P, N)."""
    inner = getattr(model, "module", model)
    points = [attack(inner, x, y) for attack in attacks.values()]
    logits = [model(point) for point in points]
    losses = [cross_entropy(scores, y, reduction="none") for scores in logits]
    return torch.stack(losses), torch.stack([scores.detach().argmax(1) == y for scores in logits])


def _outcome(
    loss: Tensor, losses: Tensor, correct: Tensor, norms: tuple[str, ...], weights: Tensor, state: State
) -> Outcome:
    metrics = {"robust/union": correct.all(0).float().mean()}
    for norm, own, right, weight in zip(norms, losses.detach(), correct, weights.detach(), strict=True):
        metrics |= {f"loss/{norm}": own.mean(), f"robust/{norm}": right.float().mean(), f"weight/{norm}": weight}
    return Outcome(loss, metrics, state)
