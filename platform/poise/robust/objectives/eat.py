"""E-AT: one threat per batch, drawn in proportion to its robust error so far."""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate

import torch
from torch import Tensor, nn

from poise.robust.objectives.base import ObjectiveInput, ObjectiveOutput, State
from poise.robust.objectives.norms import single

__all__ = ["eat", "eat_probabilities", "initial_errors"]


def eat(model: nn.Module, x: Tensor, y: Tensor, inputs: ObjectiveInput) -> ObjectiveOutput:
    """l_p for one p per batch, with probability proportional to e_p (E-AT, Croce and Hein, 2022).

    e_p is the share of wrongly classified examples among all that were trained on under p so far, over all ranks and
    never reset. The probabilities are uniform until every threat has been drawn. The paper takes linf and l1, whose
    hull nearly contains l2, and APGD of ten steps from the image itself (papers/adversarial.md, sections 2 and 3).
    """
    probabilities = eat_probabilities(inputs.state)  # (P,)
    norms = tuple(inputs.attacks)
    thresholds = list(accumulate(probabilities.tolist()))
    # rounding may leave the last threshold below the draw
    index = min(bisect(thresholds, inputs.draw), len(norms) - 1)
    norm = norms[index]
    output = single(model, x, y, inputs, norm)
    error = inputs.mean(1 - output.metrics[f"robust/{norm}"].double().view(1))
    one_hot = torch.zeros_like(probabilities)
    one_hot[index] = 1
    state = {"errors": inputs.state["errors"] + one_hot * error, "batches": inputs.state["batches"] + one_hot}
    chances = {f"chance/{norm}": chance for norm, chance in zip(norms, probabilities, strict=True)}
    return ObjectiveOutput(output.loss, output.metrics | chances, state)


def initial_errors(threats: int) -> State:
    """The state of `eat` before its first batch: summed error rates, and number of batches, of each threat (P,)."""
    return {"errors": torch.zeros(threats, dtype=torch.double), "batches": torch.zeros(threats, dtype=torch.double)}


def eat_probabilities(state: State) -> Tensor:
    """The probability of each threat (P,), float64."""
    rates = state["errors"] / state["batches"].clamp(min=1)
    every_threat_drawn = (state["batches"] > 0).all() & (rates.sum() > 0)
    rates = torch.where(every_threat_drawn, rates, torch.ones_like(rates))
    return rates / rates.sum()
