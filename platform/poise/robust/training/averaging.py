"""Averages of the iterates: SWA, EMA, and the Moreau envelope algorithm ME-A.

An average u follows the trainable parameters w. At step `start` it is w. At every later step start + t * every, for t =
1, 2, ..., it moves by

    u <- u + b_t (w - u)

For b_t = 1/t that is the equal average of those iterates; the first move overwrites the value that u had at the start.
The state is a mapping from the name of each parameter to its average. It has the same keys at all times, and no
function writes into one. The number of moves follows from the step, so that a resumed run needs nothing else.
Batch-norm buffers are not averaged: `update_bn` measures them for the averaged weights. Sources: Izmailov
et al., 2018 (SWA), and arXiv 2405.01817 (ME-A).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

__all__ = ["Average", "MoreauEnvelope", "WeightAverage", "assign", "update_bn"]

State = Mapping[str, Tensor]


class Average(Protocol):
    """An average of the weights that follows training, and may pull the weights towards it."""

    def initial(self, model: nn.Module) -> dict[str, Tensor]:
        """The state before the first step: a copy of every trainable parameter."""
        ...

    def moves(self, step: int) -> int:
        """The number of moves of u after `step` steps of the optimizer."""
        ...

    def after(self, model: nn.Module, state: State, step: int) -> dict[str, Tensor]:
        """The state once the optimizer has taken its `step`-th step."""
        ...

    def proximal_term(self, model: nn.Module, state: State, step: int) -> Tensor | None:
        """What is added to the loss of the step that follows `step` steps, a scalar; None for nothing."""
        ...


@dataclass(frozen=True)
class WeightAverage:
    """An average that moves by `rule`.

    swa: b_t = 1/t, the equal average (Izmailov et al., 2018). ema: b_t = 1 - decay_t, where decay_t = min(decay,
    (1 + t) / (10 + t)) with `warm_up` and `decay` without. const: b_t = `rate`. `start` and `every` count optimizer
    steps.
    """

    rule: Literal["swa", "ema", "const"] = "swa"
    start: int = 0
    every: int = 1
    decay: float = 0.995
    warm_up: bool = True
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.start < 0 or self.every < 1:
            raise ValueError(f"start is at least 0 and every at least 1, not {self.start} and {self.every}")
        if not (0 <= self.decay < 1 and self.rate > 0):
            raise ValueError(f"decay is in [0, 1) and rate above 0, not {self.decay} and {self.rate}")

    def initial(self, model: nn.Module) -> dict[str, Tensor]:
        """See `Average`."""
        return {name: parameter.detach().clone() for name, parameter in _trainable(model).items()}

    def moves(self, step: int) -> int:
        """See `Average`."""
        return max(0, step - self.start) // self.every

    def after(self, model: nn.Module, state: State, step: int) -> dict[str, Tensor]:
        """See `Average`."""
        parameters = _trainable(model)
        averages = [_in_layout_of(parameter, state[name]) for name, parameter in parameters.items()]
        if step >= self.start and (step - self.start) % self.every == 0:
            averages = [average.clone() for average in averages]
            weights = [parameter.detach() for parameter in parameters.values()]
            self._move(averages, weights, self.moves(step))
        return dict(zip(parameters, averages, strict=True))

    def proximal_term(self, model: nn.Module, state: State, step: int) -> None:
        """None: a plain average does not act on training."""

    def _move(self, averages: list[Tensor], weights: list[Tensor], t: int) -> None:
        """Move the averages towards the weights by b_t, in place. At the start, t = 0, they become the weights."""
        if t == 0 or self.rule == "swa":
            num_averaged = max(t - 1, 0)
            move = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
            move(averages, weights, num_averaged)  # by 1 / (num_averaged + 1)
        elif self.rule == "ema":
            decay = min(self.decay, (1 + t) / (10 + t)) if self.warm_up else self.decay
            move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            move(averages, weights, t)
        else:
            for average, weight in zip(averages, weights, strict=True):
                average.lerp_(weight, self.rate)


@dataclass(frozen=True)
class MoreauEnvelope:
    """ME-A (arXiv 2405.01817): train on R(w) + (p/2) ||w - u||^2, and move the anchor u towards w.

    With p above the weak-convexity constant of R the inner problem is strongly convex; u then descends the Moreau
    envelope M(u) = min_w R(w) + (p/2) ||w - u||^2, whose gradient is p (u - w*(u)): a move by b_t is a step of a_t =
    b_t / p. For p = 0 it is the average `anchor` alone, so b_t = 1/t gives SWA.
    """

    p: float
    anchor: WeightAverage = WeightAverage()

    def __post_init__(self) -> None:
        if self.p < 0:
            raise ValueError(f"p is at least 0, not {self.p}")

    def initial(self, model: nn.Module) -> dict[str, Tensor]:
        """See `Average`."""
        return self.anchor.initial(model)

    def moves(self, step: int) -> int:
        """See `Average`."""
        return self.anchor.moves(step)

    def after(self, model: nn.Module, state: State, step: int) -> dict[str, Tensor]:
        """See `Average`."""
        return self.anchor.after(model, state, step)

    def proximal_term(self, model: nn.Module, state: State, step: int) -> Tensor | None:
        """(p/2) ||w - u||^2 over the trainable parameters, u constant, for the step that follows `step` steps.

        None before `start`, and with p = 0.
        """
        if self.p == 0 or step < self.anchor.start:
            return None
        distances = []
        for name, w in _trainable(model).items():
            u = _in_layout_of(w, state[name])
            distances.append((w - u).square().sum())
        return self.p / 2 * torch.stack(distances).sum()


@torch.no_grad()
def assign(model: nn.Module, state: State) -> None:
    """Write averaged parameters into `model`. Raises ValueError when the parameter names differ."""
    parameters = _trainable(model)
    if parameters.keys() != state.keys():
        raise ValueError(f"not averages of this model: {sorted(parameters.keys() ^ state.keys())[:5]} differ")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


@torch.no_grad()
def update_bn(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the batch-norm statistics of `model` again, on `batches` of unattacked training inputs (N, ...).

    For each layer they are the plain mean, over batches, of the batch's mean and of its unbiased variance. Everything
    but batch norm is in eval mode meanwhile, so that dropout is inactive. Training flags are restored. A model without
    batch norm is not changed. Raises ValueError when there is no batch.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return
    with _measuring_mode(model, layers):
        for batch in batches:
            model(batch)
    if any(layer.num_batches_tracked == 0 for layer in layers):
        raise ValueError("batch-norm statistics need at least one batch")


@contextmanager
def _measuring_mode(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Inside, the batch-norm `layers` average the statistics of the batches they see, and all else is in eval mode."""
    flags = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average, see torch.nn.BatchNorm1d
            layer.training = True
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in flags:
            module.training = training


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _in_layout_of(parameter: Tensor, average: Tensor) -> Tensor:
    """The average in the memory layout of its parameter, so that sums run in the same order after a resume.

    Checkpoint files do not keep the layout.
    """
    if average.stride() == parameter.stride():
        return average
    return torch.empty_like(parameter, requires_grad=False).copy_(average)
