"""The bound by adversarial Rademacher complexity (ARC)."""

from __future__ import annotations

import math
from typing import Literal

from poise.bounds.base import Bound, BoundInput, check_samples, deviation, fixes_zero_violation
from poise.bounds.complexity import frobenius_product, log10_sum, spectral_product
from poise.bounds.operators import Network

__all__ = ["Arc", "arc_bound", "arc_gap"]


class Arc(Bound):
    """The bound on the gap of the robust ramp loss, with Frobenius norms as in the paper or with spectral norms."""

    theorem = "ARC"
    source = "arXiv 2211.14966, with explicit constants"

    def __init__(self, norms: Literal["spectral", "frobenius"]) -> None:
        """`norms`: whose product caps the network; the spectral ones are tighter, by the same proof."""
        self._product = {"spectral": spectral_product, "frobenius": frobenius_product}[norms]
        self.in_tables = norms == "spectral"

    def violation(self, network: Network) -> str | None:
        """Every activation has to map 0 to 0."""
        return fixes_zero_violation(network)

    def value(self, inputs: BoundInput) -> float:
        """log10 of the bound, see `arc_gap`."""
        network = inputs.network
        complexity = arc_bound(
            self._product(network),
            parameters=network.parameters,
            depth=len(network.layers),
            radius=inputs.radius,
            samples=inputs.samples,
        )
        return arc_gap(complexity, margin=inputs.margin, samples=inputs.samples, delta=inputs.delta)


def arc_bound(product: float, *, parameters: int, depth: int, radius: float, samples: int) -> float:
    """log10 of the adversarial Rademacher complexity of networks with `depth` affine layers under norm caps:

        24 / sqrt(N) * radius * sqrt(P ln(3 L)) * prod M.

    `product`: log10 of prod M, of Frobenius norms as in the paper or, tighter and by the same proof, of spectral norms.
    `parameters`: P, sum of h_j h_{j-1} as in the paper or, with shared weights, the number of parameters in the
    kernels. Source: arXiv 2211.14966 with explicit constants.
    """
    check_samples(radius, samples)
    entropy = parameters * math.log(3 * depth)
    return product + math.log10(24 * radius * math.sqrt(entropy / samples))


def arc_gap(complexity: float, *, margin: float, samples: int, delta: float) -> float:
    """log10 of the bound on the gap of the robust ramp loss at `margin`, with probability 1 - delta:

    2 (2 / margin) R + 3 sqrt(ln(2 / delta) / (2 N)) for log10 R = `complexity` (arXiv 2211.14966).
    """
    leading = math.log10(4 / margin) + complexity
    return log10_sum([leading, deviation(3, 2, delta, 2 * samples)])
