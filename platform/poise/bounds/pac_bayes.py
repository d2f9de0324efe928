"""The PAC-Bayes bound by spectral norms for networks under attack (arXiv 2310.06182)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from poise.bounds.base import Bound, BoundInput
from poise.bounds.complexity import log10_sum, pac_bayes_complexity, spectral_product
from poise.bounds.operators import Network

__all__ = ["PacBayes", "SpectralPacBayes", "spectral_pac_bayes"]


class SpectralPacBayes(Bound):
    """The bound on the robust risk minus the robust margin loss, or its shape without the constant."""

    theorem = "PAC-Bayes"
    source = "arXiv 2310.06182"

    def __init__(self, *, constants: bool = True) -> None:
        """`constants`: whether the value is the explicit bound, or the theorem without its constant."""
        self.is_explicit = constants
        self.in_tables = constants

    def violation(self, network: Network) -> str | None:
        """Every activation has to be a ReLU, or one with another slope below 0."""
        return None if network.homogeneous else "an activation is not homogeneous, as ReLU is"

    def value(self, inputs: BoundInput) -> float | None:
        """log10 of the gap or of the shape, see `PacBayes`."""
        network = inputs.network
        bound = spectral_pac_bayes(
            pac_bayes_complexity(network),
            product=spectral_product(network),
            depth=len(network.layers),
            width=network.width,
            radius=inputs.radius,
            margin=inputs.margin,
            samples=inputs.samples,
            delta=inputs.delta,
        )
        return bound.gap if self.is_explicit else bound.shape


@dataclass(frozen=True)
class PacBayes:
    """Base-10 logarithms of the bound.

    `shape`: the theorem without its constant. `divergence`: the explicit bound on KL. `gap`: the explicit bound on the
    robust risk minus the robust margin loss; None where that loss is 1, so that the bound is empty.
    """

    shape: float
    divergence: float
    gap: float | None


def spectral_pac_bayes(
    complexity: float,
    *,
    product: float,
    depth: int,
    width: int,
    radius: float,
    margin: float,
    samples: int,
    delta: float,
) -> PacBayes:
    """The bound for a ReLU network without biases, with probability 1 - delta over `samples` training examples.

        KL <= (42^2 e^2 / 2) L^2 h ln(4 h L) radius^2 Phi / margin^2
        gap <= 4 sqrt((KL + ln(6 N G / delta)) / (N - 1)),  G = L N^(1 / 2L)

    `complexity`: log10 Phi; `product`: log10 of the product of spectral norms; `depth` L, `width` h; `radius`: largest
    2-norm of an input that the adversary can make; `margin` is fixed before the data is seen, see `margins.on_grid`.
    """
    if not (radius > 0 and margin > 0 and samples > 1 and 0 < delta < 1):
        raise ValueError(f"no bound for radius {radius}, margin {margin}, {samples} samples, delta {delta}")
    # log10 of L^2 h radius^2 Phi / margin^2
    common = complexity + 2 * math.log10(radius * depth / margin) + math.log10(width)
    complexity_term = common + math.log10(math.log(depth * width) / samples)
    confidence_term = math.log10(math.log(depth * samples / delta) / (margin**2 * samples))
    shape = 0.5 * log10_sum([complexity_term, confidence_term])
    divergence = common + math.log10(42**2 * math.e**2 / 2 * math.log(4 * width * depth))
    # ln(6 N G / delta), by logarithms
    log_grid_size = math.log(depth) + math.log(samples) / (2 * depth)
    union = math.log(6 * samples / delta) + log_grid_size
    gap = math.log10(4) + 0.5 * (log10_sum([divergence, math.log10(union)]) - math.log10(samples - 1))
    # a margin that no output of the network can reach: the margin loss is 1
    is_empty = math.log10(margin) >= math.log10(2 * radius) + product
    return PacBayes(shape, divergence, None if is_empty else gap)
