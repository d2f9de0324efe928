"""Robust accuracy per attack and for the union of attacks, from one boolean matrix.

Union accuracy is the share of examples that withstand every attack: a logical AND per example. It is at most the
smallest accuracy, and at least one minus the sum of the errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from poise.robust.attacks import AttackResult, attack_mode
from poise.robust.attacks.base import scores
from poise.robust.attacks.sanity_checks import batch_dependence
from poise.robust.noise import Noise

__all__ = ["Evaluation", "EvaluationAttack", "evaluate", "union_accuracy"]

EvaluationAttack = Callable[[nn.Module, Tensor, Tensor, Noise], AttackResult]
"""(model, x, y, a stream of noise per example) -> result; for example `pgd` with its threat and options bound."""


def union_accuracy(correct: Tensor | np.ndarray) -> float:
    """The share of rows of `correct`, bool (n, attacks), that are True in all columns. ValueError if it is empty."""
    correct = torch.as_tensor(correct)
    if correct.ndim != 2 or correct.numel() == 0 or correct.dtype != torch.bool:
        raise ValueError(f"expected a non-empty bool matrix [n, attacks], not {correct.dtype} {tuple(correct.shape)}")
    return correct.all(dim=1).double().mean().item()


@dataclass(frozen=True)
class Evaluation:
    """Which example is right where: `correct` bool (n, 1 + attacks) on the CPU, one column per name, "clean" first."""

    names: tuple[str, ...]
    correct: Tensor

    def accuracy(self, name: str) -> float:
        """Accuracy on clean images ("clean") or under the attack of that name."""
        return union_accuracy(self.correct[:, [self.names.index(name)]])

    @property
    def union(self) -> float:
        """The share of examples that are right on the clean image and under every attack."""
        return union_accuracy(self.correct)

    def summary(self) -> dict[str, float]:
        """ "clean", "robust/<attack>" for each, "robust/average" over the attacks, "robust/union"."""
        robust = {f"robust/{name}": self.accuracy(name) for name in self.names[1:]}
        average = sum(robust.values()) / len(robust)
        return {"clean": self.accuracy("clean"), **robust, "robust/average": average, "robust/union": self.union}


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, EvaluationAttack],
    *,
    batch_size: int,
    seed: int = 0,
    indices: Sequence[int] | Tensor | None = None,
) -> Evaluation:
    """Attack every example that the model gets right, with every attack, each time from the original image.

    An example that is wrong on the clean image counts as not robust and is not attacked. The noise of an example
    depends on `seed`, the attack's name and the example's index alone. So the result depends neither on the batch size,
    nor on which other attacks run, nor, with `indices`, on how a data set was split among workers (up to the rounding
    of the model, whose last bits may differ between batch sizes).

    Warns of a model whose logits for an image alone differ from those for the same image in a batch.

    Args:
        x, y: images (n, ...) in [0, 1] and labels (n,), on the model's device.
        attacks: by name; at least one.
        indices: the indices of the examples in their data set; default 0..n-1.
    """
    if not attacks:
        raise ValueError("nothing to evaluate: name at least one attack")
    indices = range(len(x)) if indices is None else indices
    with attack_mode(model), torch.no_grad():
        if warning := batch_dependence(model, x[:batch_size]):
            warnings.warn(warning, stacklevel=2)
        predicted = torch.cat([scores(model, batch).argmax(1) for batch in torch.split(x, batch_size)])  # (n,)
        clean = predicted == y
        correct = clean.unsqueeze(1).repeat(1, 1 + len(attacks))  # (n, 1 + attacks)
        for column, (name, attack) in enumerate(attacks.items(), start=1):
            noise = Noise.of(seed, name, indices, x.device)
            for rows in torch.split(clean.nonzero().flatten(), batch_size):
                if len(rows):  # a split of no examples is one empty batch
                    correct[rows, column] = attack(model, x[rows], y[rows], noise.select(rows)).correct
    return Evaluation(("clean", *attacks), correct.cpu())
