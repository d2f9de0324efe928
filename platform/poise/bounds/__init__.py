"""Operator norms of networks, margins, and generalisation bounds for networks under attack.

A bound by a new theorem is one file and one line in `BOUNDS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from poise.bounds.base import Bound, BoundInput
from poise.bounds.pac_bayes import SpectralPacBayes
from poise.bounds.rademacher import Arc, Covering

__all__ = ["BOUNDS", "Bound", "BoundInput"]

BOUNDS: Mapping[str, Bound] = {
    "arc": Arc("spectral"),
    "arc_frobenius": Arc("frobenius"),
    "pac_bayes": SpectralPacBayes(),
    "pac_bayes_shape": SpectralPacBayes(constants=False),
    "covering": Covering(),
}
"""All bounds by name, in the order of tables."""
