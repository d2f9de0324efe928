"""What a generalisation bound is: its assumptions, its value for a trained network, its source."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from poise.bounds.operators import Network

__all__ = ["Bound", "BoundInput", "check_samples", "deviation", "fixes_zero_violation"]


@dataclass(frozen=True)
class BoundInput:
    """A trained network, and what a bound on its gap between training and test holds for.

    Attributes:
        network: norms of its layers, measured after training. A bound for measured norms would need a union over norm
            caps; it is left out, as in the papers' own experiments.
        radius: the largest 2-norm of an input that the adversary can make, see `margins.data_radius`.
        margin: of the classifier, fixed before the data is seen, see `margins.on_grid`.
        samples: number of training examples.
        delta: the probability that the bound may fail.
    """

    network: Network
    radius: float
    margin: float
    samples: int
    delta: float


class Bound(ABC):
    """A bound on the gap, or the shape of one. The options of a bound are arguments of its constructor.

    Attributes:
        theorem: the name of the bound for people; bounds by one theorem share it.
        source: where the theorem is stated.
        is_explicit: whether all constants are known, so that the value limits the gap. Otherwise it compares networks.
        in_tables: whether tables show it, under the name of its theorem.
        note: what a reader of the values should know; may be empty.
    """

    theorem: ClassVar[str]
    source: ClassVar[str]
    is_explicit: bool = True
    in_tables: bool = True
    note: str = ""

    @abstractmethod
    def violation(self, network: Network) -> str | None:
        """The assumption of the theorem that a network violates, as a clause; None if it violates none."""

    @abstractmethod
    def value(self, inputs: BoundInput) -> float | None:
        """log10 of the bound for a network that fulfils the assumptions; None where it limits nothing."""


def fixes_zero_violation(network: Network) -> str | None:
    """The violation of the assumption that every activation maps 0 to 0."""
    return None if network.fixes_zero else "an activation does not map 0 to 0, as softplus"


def deviation(factor: float, numerator: float, delta: float, samples: int) -> float:
    """log10 of factor * sqrt(ln(numerator / delta) / samples)."""
    return math.log10(factor * math.sqrt(math.log(numerator / delta) / samples))


def check_samples(radius: float, samples: int) -> None:
    """Raise ValueError unless there is an input other than 0, and a sample."""
    if not radius > 0 or samples < 1:
        raise ValueError(f"a bound needs a radius above 0 and at least one sample, not {radius} and {samples}")
