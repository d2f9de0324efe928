"""E-AT: one threat per batch, the more often the more it still fools the model."""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate

import torch
from torch import Tensor, nn

from poise.robust.objectives.norms import single
from poise.robust.objectives.play import Outcome, Play, State

__all__ = ["eat", "eat_probabilities", "initial_errors"]


def eat(model: nn.Module, x: Tensor, y: Tensor, play: Play) -> Outcome:
    """l_p for one p per batch, with probability proportional to e_p (E-AT, Croce and Hein, 2022).

    e_p is the share of all examples so far trained on under p that were classified wrong there, over all ranks and
    never reset; uniform until every threat has been seen. The paper takes linf and l1, whose hull nearly contains l2,
    and APGD of ten steps from the image itself (papers/adversarial.md, sections 2 and 3).
    """
    probabilities = eat_probabilities(play.state)
    norms, thresholds = tuple(play.attacks), list(accumulate(probabilities.tolist()))
    index = min(bisect(thresholds, play.draw), len(norms) - 1)
    out = single(model, x, y, play, norms[index])
    error = play.mean(1 - out.metrics[f"robust/{norms[index]}"].double().view(1))
    mark = torch.zeros_like(probabilities).index_fill(0, torch.tensor([index], device=probabilities.device), 1)
    state = {"errors": play.state["errors"] + mark * error, "batches": play.state["batches"] + mark}
    chances = {f"chance/{norm}": chance for norm, chance in zip(norms, probabilities, strict=True)}
    return Outcome(out.loss, out.metrics | chances, state)


def initial_errors(threats: int) -> State:
    """The state of `eat` before its first batch: summed error rates, and batches seen, of each threat (P,)."""
    return {"errors": torch.zeros(threats, dtype=torch.double), "batches": torch.zeros(threats, dtype=torch.double)}


def eat_probabilities(state: State) -> Tensor:
    """The probability of each threat (P,), float64."""
    rates = state["errors"] / state["batches"].clamp(min=1)
    known = (state["batches"] > 0).all() & (rates.sum() > 0)
    rates = torch.where(known, rates, torch.ones_like(rates))
    return rates / rates.sum()
