"""Clustering of answers, by name: a partition of the answers to one question into classes of equal meaning.

One back-end is one file here and one line in `CLUSTERERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from poise.calibrate.clustering.base import Clusterer, Clusters
from poise.calibrate.clustering.exact import ExactMatch
from poise.spec.registry import union_of

__all__ = ["CLUSTERERS", "Clusterer", "ClustererSpec", "Clusters", "ExactMatch"]

CLUSTERERS: Mapping[str, type[Clusterer]] = {
    "exact": ExactMatch,
}
"""The class of each back-end, by name."""

if TYPE_CHECKING:
    ClustererSpec = Clusterer
else:
    ClustererSpec = union_of(CLUSTERERS, Clusterer, "poise.clustering")
    """The section `clustering` of a spec: one of `CLUSTERERS`, or code of the user or of an installed package."""
