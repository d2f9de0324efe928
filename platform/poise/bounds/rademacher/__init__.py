"""Bounds by covering numbers: adversarial Rademacher complexity, and the uniform cover. Results are base-10 logarithms.

`radius` is the largest 2-norm of an input that the adversary can make (see `margins.data_radius`), `samples` the number
of training examples.
"""

from __future__ import annotations

from poise.bounds.rademacher.arc import Arc, arc_bound, arc_gap
from poise.bounds.rademacher.covering import Covering, covering_bound

__all__ = ["Arc", "Covering", "arc_bound", "arc_gap", "covering_bound"]
