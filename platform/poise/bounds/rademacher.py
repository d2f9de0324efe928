"""Bounds by covering numbers: adversarial Rademacher complexity, and the uniform cover. Results are base-10 logarithms.

`radius` is the largest 2-norm of an input that the adversary can make (see `margins.data_radius`), `samples` the number
of training examples. Norms are measured after training. A bound for measured norms would need a union over norm caps;
it is left out, as in the papers' own experiments.
"""

from __future__ import annotations

import math

from poise.bounds.complexity import log10_sum

__all__ = ["arc_bound", "arc_gap", "covering_bound"]


def arc_bound(product: float, *, parameters: int, depth: int, radius: float, samples: int) -> float:
    """log10 of the adversarial Rademacher complexity of networks with `depth` affine layers under norm caps:

        24 / sqrt(N) * radius * sqrt(P ln(3 L)) * prod M.

    `product`: log10 of prod M, of Frobenius norms as in the paper or, tighter and by the same proof, of spectral norms.
    `parameters`: P, sum of h_j h_{j-1} as in the paper or, with shared weights, the number of parameters in the
    kernels. Source: arXiv 2211.14966 with explicit constants (papers/bounds.md, 2).
    """
    _check(radius, samples)
    entropy = parameters * math.log(3 * depth)
    return product + math.log10(24 * radius * math.sqrt(entropy / samples))


def arc_gap(complexity: float, *, margin: float, samples: int, delta: float) -> float:
    """log10 of the bound on the gap of the robust ramp loss at `margin`, with probability 1 - delta:

    2 (2 / margin) R + 3 sqrt(ln(2 / delta) / (2 N)) for log10 R = `complexity` (papers/bounds.md, 2).
    """
    leading = math.log10(4 / margin) + complexity
    return log10_sum([leading, _deviation(3, 2, delta, 2 * samples)])


def covering_bound(
    complexity: float, *, lipschitz: float, radius: float, samples: int, delta: float | None = None
) -> float:
    """log10 of the shape of the bound on the gap by uniform covers, logarithmic factors and constants left out:

        radius * lipschitz * R / sqrt(N) [+ sqrt(ln(1 / delta) / N)].

    `complexity`: log10 R, see `covering_complexity`; `lipschitz`: of the loss in the logits, 2 / margin for the ramp.
    Source: arXiv 2406.05372, Theorem 1 (papers/bounds.md, 4). Its constants are not known: use it to compare networks,
    not as a bound on a gap.
    """
    _check(radius, samples)
    leading = complexity + math.log10(radius * lipschitz / math.sqrt(samples))
    if delta is None:
        return leading
    return log10_sum([leading, _deviation(1, 1, delta, samples)])


def _deviation(factor: float, numerator: float, delta: float, samples: int) -> float:
    """log10 of factor * sqrt(ln(numerator / delta) / samples)."""
    return math.log10(factor * math.sqrt(math.log(numerator / delta) / samples))


def _check(radius: float, samples: int) -> None:
    if not radius > 0 or samples < 1:
        raise ValueError(f"a bound needs a radius above 0 and at least one sample, not {radius} and {samples}")
