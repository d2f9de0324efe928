"""What the norms of the layers say together: products along the path, and sums of them, as base-10 logarithms.

Every bound needs, of each layer, the product of the spectral norms of all that lies before and behind it: in a chain
(prod s) / s_i. A block counts as the sum of its arms' products. Everything is a sum of logarithms: the products of real
networks leave the floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.special import logsumexp

from poise.bounds.operators import Block, Network, Path, Unit

__all__ = ["covering_complexity", "frobenius_product", "log10_sum", "pac_bayes_complexity", "spectral_product"]


def spectral_product(network: Network) -> float:
    """log10 of the product of the spectral norms: a Lipschitz constant of the network in its input, in 2-norms."""
    return _along(network.path, _logs(layer.sigma_hi for layer in network.layers))


def frobenius_product(network: Network) -> float:
    """log10 of the same product of Frobenius norms."""
    return _along(network.path, _logs(layer.frobenius for layer in network.layers))


def pac_bayes_complexity(network: Network) -> float:
    """log10 of Phi = sum_i F_i^2 (prod_{j != i} s_j)^2 (papers/bounds.md, 3 and 1.6)."""
    return log10_sum(2 * (own + rest) for own, rest in _terms(network, (layer.frobenius for layer in network.layers)))


def covering_complexity(network: Network) -> float:
    """log10 of R = (sum_i (a_i prod_{j != i} s_j)^(2/3))^(3/2), a_i the entrywise l1 norm (papers/bounds.md, 4)."""
    terms = _terms(network, (layer.l1 for layer in network.layers))
    return 1.5 * log10_sum(2 / 3 * (own + rest) for own, rest in terms)


def log10_sum(terms: Iterable[float]) -> float:
    """log10 of the sum of 10^term, without leaving the floats."""
    return float(logsumexp(np.array(list(terms)) * math.log(10))) / math.log(10)


def _terms(network: Network, norms: Iterable[float]) -> Iterator[tuple[float, float]]:
    """Of each layer: log10 of its norm, and of the product of all that lies before and behind it."""
    rests = dict(_rests(network.path, _logs(layer.sigma_hi for layer in network.layers), 0.0))
    return ((own, rests[index]) for index, own in enumerate(_logs(norms)))


def _rests(path: Path, logs: Sequence[float], outer: float) -> Iterator[tuple[int, float]]:
    sizes = [_size(unit, logs) for unit in path]
    for place, unit in enumerate(path):
        rest = outer + sum(sizes[:place]) + sum(sizes[place + 1 :])
        if isinstance(unit, Block):
            yield from _rests(unit.main, logs, rest)
            yield from _rests(unit.shortcut, logs, rest)
        elif isinstance(unit, int):
            yield unit, rest


def _along(path: Path, logs: Sequence[float]) -> float:
    return sum(_size(unit, logs) for unit in path)


def _size(unit: Unit, logs: Sequence[float]) -> float:
    if isinstance(unit, Block):
        return log10_sum([_along(unit.main, logs), _along(unit.shortcut, logs)])
    return logs[unit] if isinstance(unit, int) else math.log10(unit)


def _logs(values: Iterable[float]) -> list[float]:
    return [math.log10(value) if value > 0 else -math.inf for value in values]
