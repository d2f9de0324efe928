"""What multi-norm adversarial training minimises.

Notation: theta are the parameters, p a threat, P the number of threats, l_p(theta) the mean cross entropy of a batch at
its adversarial examples for p. Sources: papers/adversarial.md, section 3.

Each objective is a function of one batch. All adversarial examples are crafted before the first training forward, so
that every threat meets the same model. Each threat then has a training forward of its own, in the mode that the model
is in (train, in training), so that BN normalises each threat by its own statistics. Under DistributedDataParallel the
forwards go through the wrapper, and the attacks get the module inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from poise.robust.attacks import cross_entropy
from poise.robust.objective_spec import Adt
from poise.robust.objectives.base import ObjectiveInput, ObjectiveOutput, State, craft, make_output

__all__ = [
    "adt",
    "adt_weights",
    "at",
    "avg",
    "initial_weights",
    "logits_of",
    "losses_of",
    "max",
    "share_of_worst",
    "single",
]


def at(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """l_p for the only threat p (Madry et al., 2018)."""
    (norm,) = inputs.attacks
    return single(model, x, y, inputs, norm)


def avg(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """(1/P) sum_p l_p, one step on the joint mean (Tramer and Boneh, 2019); with `options.weights`, sum_p w_p l_p.

    In mode "sequential", as in the public multi-norm codes, optimizer step s is one on the (s mod P)-th of the threats
    l1, l2, linf alone. The caller passes each batch P times, so that each attack meets the model as the step before it
    left it.
    """
    norms = tuple(inputs.attacks)
    if inputs.options.mode == "sequential":
        backwards = norms[::-1]  # l1, l2, linf
        return single(model, x, y, inputs, backwards[inputs.step % len(norms)])
    losses, correct = losses_of(model, x, y, inputs)  # (P, N) each
    per_threat = losses.mean(1)  # (P,)
    shares = inputs.options.weights or {}
    equal_share = 1 / len(norms)
    weights = torch.tensor([float(shares.get(norm, equal_share)) for norm in norms], device=x.device)  # (P,)
    loss = (weights * per_threat).sum() if shares else per_threat.mean()
    return make_output(inputs, loss, losses, correct, norms, weights)


def max(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """(1/N) sum_i max_p l_{p,i}, the worst threat of each example (Tramer and Boneh, 2019).

    The worst threat is chosen by the losses of the P training forwards themselves, not by an extra forward in eval
    mode. So what is minimised is exactly the maximum, and it is never below any l_p.
    """
    losses, correct = losses_of(model, x, y, inputs)  # (P, N) each
    worst = losses.max(dim=0)  # over threats: values and indices (N,)
    shares = share_of_worst(worst.indices, losses)
    return make_output(inputs, worst.values.mean(), losses, correct, tuple(inputs.attacks), shares)


def share_of_worst(worst: Tensor, losses: Tensor) -> Tensor:
    """The share of examples that each threat is the worst for, (P,), from its index `worst` (N,) and losses (P, N)."""
    return nn.functional.one_hot(worst, len(losses)).to(losses.dtype).mean(0)


def adt(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """sum_p w_p l_p with weights that adapt, constants for the gradient (ADT, arXiv 2210.00557; its public code).

    With b_p = 1 / max(l_p, floor), `inverse_loss` has w_p = b_p / sum_q b_q and `proportional_loss` has w_p = l_p /
    sum_q l_q. With lag 1 a batch is weighed by the losses of the batch before it (uniformly at first, and again at the
    start of each epoch if reset is "epoch"); with lag 0 by its own losses.

    `smoothness` is this project's own proposal, not the paper's: w_p is proportional to 1 / eta_p, where eta_p is the
    moving average of ||grad l_p(theta_{t+1}) - grad l_p(theta_t)||, which includes the change from batch to batch.
    The weights are uniform until there is a first difference. It takes one more parameter gradient per threat, and
    keeps it in the state (P x parameters).
    """
    norms = tuple(inputs.attacks)
    state = inputs.state
    if inputs.first_in_epoch and inputs.options.reset == "epoch":
        state = initial_weights(inputs.options, norms)
    losses, correct = losses_of(model, x, y, inputs)  # (P, N) each
    per_threat = losses.mean(1)  # (P,)
    next_state = _adapt(model, per_threat, state, inputs, norms)
    weights_from = next_state if inputs.options.lag == 0 else state
    weights = weights_from["weights"].to(per_threat)  # (P,), without gradient
    loss = (weights * per_threat).sum()
    return make_output(inputs, loss, losses, correct, norms, weights, next_state)


def initial_weights(options: Adt, norms: Sequence[str]) -> State:
    """The state of `adt` before its first batch: uniform weights (P,) in the order of `norms`."""
    state = {"weights": torch.full((len(norms),), 1 / len(norms))}
    if options.weighting == "smoothness":
        state["roughness"] = torch.zeros(len(norms))
    return state


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


def _adapt(model: nn.Module, per_threat: Tensor, state: State, inputs: ObjectiveInput, norms: tuple[str, ...]) -> State:
    """The state of `adt` after a batch with the mean losses `per_threat` (P,), the same on every rank."""
    options: Adt = inputs.options
    floor = float(options.floor)
    if options.weighting != "smoothness":
        mean_losses = inputs.mean(per_threat.detach())
        return {"weights": adt_weights(mean_losses, options.weighting, norms, floor)}
    gradients = inputs.mean(_parameter_gradients(model, per_threat))  # (P, parameters)
    roughness = state["roughness"].to(per_threat)  # (P,)
    decay = float(options.smoothness_decay)
    if "gradients" in state:
        difference = gradients - state["gradients"].to(gradients)
        change = torch.linalg.vector_norm(difference, dim=1).to(per_threat)  # (P,)
        average = decay * roughness + (1 - decay) * change
        # a roughness of 0 has not been measured yet: the first change is taken as it is, not averaged with 0
        roughness = torch.where(roughness > 0, average, change)
    weights = adt_weights(roughness, options.weighting, norms, floor)
    return {"weights": weights, "roughness": roughness, "gradients": gradients}


def _parameter_gradients(model: nn.Module, losses: Tensor) -> Tensor:
    """Parameter gradients (P, number of parameters) of `losses` (P,), whose graph is kept."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten().float() for gradient in gradients]))
    return torch.stack(rows)


def single(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    inputs: ObjectiveInput,
    norm: str,
    state: State | None = None,
    **options: Any,
) -> ObjectiveOutput:
    """l_p for the threat `norm` out of several.

    The other threats have weight 0. With several threats there is no "robust/union": only one was attacked.
    """
    one_threat = replace(inputs, attacks={norm: inputs.attacks[norm]}, fused=None)
    losses, correct = losses_of(model, x, y, one_threat, **options)  # (1, N) each
    (loss,) = losses.mean(1)
    output = make_output(inputs, loss, losses, correct, (norm,), torch.ones_like(loss).view(1), state)
    metrics = output.metrics
    if len(inputs.attacks) > 1:
        del metrics["robust/union"]
    for other in inputs.attacks:
        if other != norm:
            metrics[f"weight/{other}"] = torch.zeros_like(loss)
    return output


def losses_of(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput, **options: Any) -> tuple[Tensor, Tensor]:
    """Cross entropies (P, N) with their graph, and which adversarial examples are classified right, bool (P, N).

    `options` go to the attacks.
    """
    logits = logits_of(model, x, y, inputs, **options)
    losses = torch.stack([cross_entropy(scores, y) for scores in logits])
    correct = torch.stack([scores.detach().argmax(1) == y for scores in logits])
    return losses, correct


def logits_of(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput, **options: Any) -> list[Tensor]:
    """Logits (N, K) at the adversarial examples of each threat, with their graph."""
    return [model(point) for point in craft(model, x, y, inputs, **options)]
