"""The shape of the bound by uniform covers."""

from __future__ import annotations

import math

from poise.bounds.base import Bound, BoundInput, check_samples, deviation, fixes_zero_violation
from poise.bounds.complexity import covering_complexity, log10_sum
from poise.bounds.operators import Network

__all__ = ["Covering", "covering_bound"]


class Covering(Bound):
    """The bound on the gap of the robust ramp loss, without its constants: it compares networks."""

    theorem = "cover"
    source = "arXiv 2406.05372, Theorem 1"
    is_explicit = False
    note = "a shape without constants and logarithms, comparable but no bound"

    def violation(self, network: Network) -> str | None:
        """Every activation has to map 0 to 0."""
        return fixes_zero_violation(network)

    def value(self, inputs: BoundInput) -> float:
        """log10 of the shape, see `covering_bound`."""
        return covering_bound(
            covering_complexity(inputs.network),
            lipschitz=2 / inputs.margin,  # of the ramp loss
            radius=inputs.radius,
            samples=inputs.samples,
            delta=inputs.delta,
        )


def covering_bound(
    complexity: float, *, lipschitz: float, radius: float, samples: int, delta: float | None = None
) -> float:
    """log10 of the shape of the bound on the gap by uniform covers, logarithmic factors and constants left out:

        radius * lipschitz * R / sqrt(N) [+ sqrt(ln(1 / delta) / N)].

    `complexity`: log10 R, see `covering_complexity`; `lipschitz`: of the loss in the logits, 2 / margin for the ramp.
    Source: arXiv 2406.05372, Theorem 1. Its constants are not known: use it to compare networks,
    not as a bound on a gap.
    """
    check_samples(radius, samples)
    leading = complexity + math.log10(radius * lipschitz / math.sqrt(samples))
    if delta is None:
        return leading
    return log10_sum([leading, deviation(1, 1, delta, samples)])
