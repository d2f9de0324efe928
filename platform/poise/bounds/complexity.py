"""Products of layer norms along the path of a network, and sums over its layers, as base-10 logarithms.

Every bound needs, for each layer, the product of the spectral norms of all elements before and behind it: in a chain
(prod s) / s_i. A residual block counts as the sum of the products along its two arms. Everything is a sum of
logarithms, because the products of real networks overflow floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.special import logsumexp

from poise.bounds.operators import Block, LayerPath, Network, PathElement

__all__ = ["covering_complexity", "frobenius_product", "log10_sum", "pac_bayes_complexity", "spectral_product"]


def spectral_product(network: Network) -> float:
    """log10 of the product of the spectral norms: a Lipschitz constant of the network in its input, in 2-norms."""
    log_sigmas = _log10_all(layer.sigma_hi for layer in network.layers)
    return _log10_product(network.path, log_sigmas)


def frobenius_product(network: Network) -> float:
    """log10 of the same product of Frobenius norms."""
    log_norms = _log10_all(layer.frobenius for layer in network.layers)
    return _log10_product(network.path, log_norms)


def pac_bayes_complexity(network: Network) -> float:
    """log10 of Phi = sum_i F_i^2 (prod_{j != i} s_j)^2 (arXiv 2310.06182)."""
    log_frobenius = _log10_all(layer.frobenius for layer in network.layers)
    log_others = _log10_product_of_others(network)
    return log10_sum(2 * (norm + others) for norm, others in zip(log_frobenius, log_others, strict=True))


def covering_complexity(network: Network) -> float:
    """log10 of R = (sum_i (a_i prod_{j != i} s_j)^(2/3))^(3/2), a_i the entrywise l1 norm (arXiv 2406.05372)."""
    log_l1 = _log10_all(layer.l1 for layer in network.layers)
    log_others = _log10_product_of_others(network)
    log_sum = log10_sum(2 / 3 * (norm + others) for norm, others in zip(log_l1, log_others, strict=True))
    return 1.5 * log_sum


def log10_sum(terms: Iterable[float]) -> float:
    """log10 of the sum of 10^term, without overflow."""
    natural_logs = np.array(list(terms)) * math.log(10)
    return float(logsumexp(natural_logs)) / math.log(10)


def _log10_product_of_others(network: Network) -> list[float]:
    """For each layer, log10 of the product of the spectral norms of all elements before and behind it."""
    log_sigmas = _log10_all(layer.sigma_hi for layer in network.layers)
    others = dict(_products_of_others(network.path, log_sigmas, 0.0))
    return [others[index] for index in range(len(network.layers))]


def _products_of_others(path: LayerPath, logs: Sequence[float], outside: float) -> Iterator[tuple[int, float]]:
    """(layer, log10 of the product of the rest) for the layers on `path`, inside of `outside`, log10 of a product."""
    sizes = [_log10_size(element, logs) for element in path]
    for place, element in enumerate(path):
        others = outside + sum(sizes[:place]) + sum(sizes[place + 1 :])
        if isinstance(element, Block):
            # a layer in one arm is not multiplied by the other arm, only by what surrounds the block
            yield from _products_of_others(element.main, logs, others)
            yield from _products_of_others(element.shortcut, logs, others)
        elif isinstance(element, int):
            yield element, others


def _log10_product(path: LayerPath, logs: Sequence[float]) -> float:
    return sum(_log10_size(element, logs) for element in path)


def _log10_size(element: PathElement, logs: Sequence[float]) -> float:
    """log10 of the factor of one element; `logs` are those of the layers, by index."""
    if isinstance(element, Block):
        return log10_sum([_log10_product(element.main, logs), _log10_product(element.shortcut, logs)])
    return logs[element] if isinstance(element, int) else math.log10(element)


def _log10_all(values: Iterable[float]) -> list[float]:
    return [math.log10(value) if value > 0 else -math.inf for value in values]
