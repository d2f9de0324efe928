"""The default steps of projected gradient ascent: each as a number and in the words of a spec."""

from __future__ import annotations

import math

__all__ = ["DECAYING_STEPS", "DEFAULT_SPARSITY", "TRAINING_STEP", "decaying_steps", "training_step"]

DEFAULT_SPARSITY = (5, 20)
"""How many coordinates one l1 step moves: each example draws from this range at each step."""

TRAINING_STEP = "2.5 * eps / steps, at most eps"
"""`training_step` in words."""

DECAYING_STEPS = "steps that decay from eps to 0 on a cosine"
"""`decaying_steps` in words."""


def training_step(eps: float, steps: int) -> float:
    """The default step length of training: 2.5 * eps / steps (Madry et al., 2018), at most eps."""
    return min(2.5 * eps / steps, eps)


def decaying_steps(eps: float, steps: int) -> tuple[float, ...]:
    """The default step lengths of an evaluation: eps * (1 + cos(pi * t / steps)) / 2 for t = 0, ..., steps - 1.

    The first step crosses the ball and the last ones refine, so that more steps make a stronger attack. Many equal
    steps of 2.5 * eps / steps cannot leave the region of their start. Cosine-annealed steps are those of
    Probability Margin Attack (arXiv 2411.15210), here from eps instead of 2 * eps.
    """
    return tuple(eps * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps))
