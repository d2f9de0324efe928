# ruff: noqa: N803 - P is the field's own name for a preference matrix
"""Preference games over n answers, solved exactly or by the tabular form of the self-play methods; numpy, float64.

P is a preference matrix (n, n): P[i, j] = P(answer i is preferred to answer j), so P + P.T = 1. A policy is a
distribution (n,). The game max_p min_q p' P q is symmetric and constant-sum, so its value is 1/2 (NLHF, 2312.00886).
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from poise.align.equilibria import maximal_entropy_equilibrium

__all__ = [
    "Vector",
    "exploitability",
    "magnetic_mirror_descent",
    "mirror_step",
    "mpo",
    "nash_equilibrium",
    "nash_rs",
    "preferences",
    "regularised_nash",
]

Vector = NDArray[np.float64]

_MAX_STEPS = 1_000_000
_SMALLEST_TAU = 1e-4
"""The smallest tau, in units of the largest |P - 1/2|: about 400,000 steps."""


def preferences(P: ArrayLike) -> Vector:
    """P as float64 (n, n). Raises ValueError unless it is square, in [0, 1] and P + P.T = 1."""
    matrix = np.asarray(P, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"a preference matrix is square, not {matrix.shape}")
    is_probability = ((matrix >= 0) & (matrix <= 1)).all()  # False for NaN too
    if not is_probability or np.abs(matrix + matrix.T - 1).max() > 1e-9:
        raise ValueError("a preference matrix holds probabilities with P[i, j] + P[j, i] = 1, and 1/2 on its diagonal")
    return matrix


def exploitability(P: ArrayLike, p: ArrayLike) -> Any:
    """max(P p) - 1/2: how much more than the value of the game the best response to the policy p wins; 0 at a NE.

    A float for one policy (n,), an array (Q,) for Q policies (Q, n).
    """
    matrix = preferences(P)
    policy = _policy(p, len(matrix))
    gains = (policy @ matrix.T).max(-1) - 0.5  # () or (Q,)
    return float(gains) if policy.ndim == 1 else gains


def nash_equilibrium(P: ArrayLike) -> Vector:
    """The equilibrium of the game that has the largest entropy: a p with p' (P - 1/2) >= 0; (n,).

    A game with ties can have many equilibria, and a linear program returns an arbitrary vertex of that set. This one is
    unique, gives equal answers equal probabilities, and is the limit of `regularised_nash` with a uniform reference for
    tau to 0. ValueError if P is not a preference matrix.
    """
    return maximal_entropy_equilibrium(preferences(P) - 0.5)


def mirror_step(p: Vector, gain: Vector, magnet: Vector, alpha: float, eta: float) -> Vector:
    """argmax_q <q, gain> - alpha KL(q||magnet) - KL(q||p) / eta.

    It is (p magnet^(eta alpha) e^(eta gain))^(1 / (1 + eta alpha)), normalised. All (n,), or (Q, n) for Q problems at
    once. ValueError unless alpha >= 0 and eta > 0.
    """
    _check_coefficient("alpha", alpha, valid=alpha >= 0)
    _check_coefficient("eta", eta, valid=eta > 0)
    with np.errstate(divide="ignore"):  # log 0 = -inf: an answer of probability 0 keeps that probability
        logits = np.log(p) + eta * gain
        if alpha:
            logits = logits + eta * alpha * np.log(magnet)
    return np.asarray(softmax(logits / (1 + eta * alpha), axis=-1))


def magnetic_mirror_descent(
    P: ArrayLike, magnet: ArrayLike, *, alpha: float, eta: float, steps: int, start: ArrayLike | None = None
) -> Vector:
    """`steps` steps of MMD in self-play from `start` (the magnet by default); (n,).

    With eta <= alpha / L^2, L = max|P - 1/2|, KL(p*||p_k) <= (1 + eta alpha)^-k KL(p*||p_0) for the equilibrium p* of
    the game that is regularised towards the magnet (Sokota et al., ICLR 2023, theorem 3.4).
    """
    matrix = preferences(P)
    centre = _policy(magnet, len(matrix))
    p = centre if start is None else _policy(start, len(matrix))
    for _ in range(_count(steps, "steps")):
        p = mirror_step(p, matrix @ p, centre, alpha, eta)
    return p


def mpo(P: ArrayLike, start: ArrayLike, *, alpha: float, eta: float, period: int, magnets: int) -> Vector:
    """Magnetic preference optimization: MMD whose magnet becomes the policy after every `period` steps; (n,).

    It approaches the equilibrium of the game itself if each period comes close to its regularised equilibrium. With
    period 1 the magnet is the policy, which is plain mirror descent and does not converge (2410.16714, lemma 3.3).
    """
    p = _policy(start, len(preferences(P)))
    for _ in range(_count(magnets, "magnets")):
        p = magnetic_mirror_descent(P, p, alpha=alpha, eta=eta, steps=period)
    return p


def regularised_nash(P: ArrayLike, ref: ArrayLike, tau: float) -> Vector:
    """The unique equilibrium p = ref exp(P p / tau) / Z of the game with -tau KL(p||ref) + tau KL(q||ref).

    It is computed by mirror prox: the opponent of each step is the policy after a trial step, and both steps start at
    the current policy. With steps of 1 / L, L = max|P - 1/2|, KL(p*||p_k) falls at least by the factor 1 / (1 + tau /
    L) per step (Nash Mirror Prox, 2505.19731 v1, whose step is that of L = 1/2). Steps against the policy itself would
    take about (L / tau)^2 of them.

    Args:
        P: preference matrix (n, n).
        ref: reference (n,), or (Q, n) for the equilibria of Q games with the same P at once.
        tau: above 0; for a uniform ref the limit at 0 is `nash_equilibrium`.

    Returns:
        (n,) or (Q, n), to about 1e-14.

    Raises:
        ValueError: an invalid preference matrix, reference or tau, or a tau below 1e-4 L, which would take minutes.
    """
    matrix, anchor, largest = _regularised_game(P, ref, tau)
    if not largest:  # all answers tie
        return anchor
    if tau < _SMALLEST_TAU * largest:
        raise ValueError(f"tau {tau:g} is less than {_SMALLEST_TAU * largest:g}, 1e-4 of the game's largest |P - 1/2|")

    def mirror_prox_step(p: Vector) -> Vector:
        opponent = mirror_step(p, p @ matrix.T, anchor, tau, 1 / largest)
        return mirror_step(p, opponent @ matrix.T, anchor, tau, 1 / largest)

    return _fixed_point(mirror_prox_step, anchor)


def nash_rs(P: ArrayLike, ref: ArrayLike, tau: float) -> Vector:
    """The fixed point of Nash-RS (2503.10990 v1): the policy against the proposals that rejection accepts; (n,).

    The reward is (P q) / tau and the KL coefficient 1, in units of tau; the opponents q are `accepted`. At the fixed
    point q = p, the regularised equilibrium. The objective is smooth with constant L^2 / tau relative to the entropy,
    L = max|P - 1/2|. So steps of tau / L^2 converge, by the factor 1 / (1 + (tau / L)^2) each. ValueError as in
    `regularised_nash`, and where tau is too small for that rate.
    """
    matrix, anchor, largest = _regularised_game(P, ref, tau)
    if anchor.ndim != 1:
        raise ValueError(f"the reference is one policy, not {anchor.shape}")
    if not largest:
        return anchor
    game = preferences(P)
    step_size = tau / largest**2

    def nash_rs_step(p: Vector) -> Vector:
        opponent = accepted(game, p, anchor, tau)
        return mirror_step(p, matrix @ opponent, anchor, tau, step_size)

    return _fixed_point(nash_rs_step, anchor)


def accepted(P: Vector, p: Vector, ref: Vector, tau: float) -> Vector:
    """ref exp(-g / tau) / Z, g[k] = P(p > answer k): proposals of ref, kept with probability exp(-g / tau); (n,)."""
    _check_coefficient("tau", tau, valid=tau > 0)
    with np.errstate(divide="ignore"):  # log 0 = -inf: an answer that ref never gives is never proposed
        return np.asarray(softmax(np.log(ref) - (p @ P) / tau))


def _regularised_game(P: ArrayLike, ref: ArrayLike, tau: float) -> tuple[Vector, Vector, float]:
    """P - 1/2 (the same game with value 0), the reference, and L = max|P - 1/2|."""
    if not (isfinite(tau) and tau > 0):
        raise ValueError(f"tau is a number above 0, not {tau}; without a reference, nash_equilibrium solves the game")
    matrix = preferences(P) - 0.5
    return matrix, _policy(ref, len(matrix)), float(np.abs(matrix).max())


def _fixed_point(update: Callable[[Vector], Vector], p: Vector) -> Vector:
    """Iterate a contraction from p until only rounding changes: the change is 0, or no longer gets smaller."""
    smallest = np.inf
    steps_since = 0  # since the smallest change
    for _ in range(_MAX_STEPS):
        previous = p
        p = update(p)
        change = float(np.abs(p - previous).max())
        steps_since = 0 if change < smallest else steps_since + 1
        smallest = min(smallest, change)
        if change < 1e-16 or (smallest < 1e-14 and steps_since > 20):
            return p
    raise ValueError(f"no fixed point after {_MAX_STEPS:,} steps: tau is too small for this game")


def _policy(p: ArrayLike, n: int) -> Vector:
    """p as float64 (n,) or (Q, n). ValueError unless it is one distribution over n answers, or Q of them."""
    policy = np.asarray(p, dtype=np.float64)
    sums_to_one = (np.abs(policy.sum(-1) - 1) <= 1e-9).all()
    if policy.ndim not in (1, 2) or not (policy >= 0).all() or not sums_to_one:
        raise ValueError(f"a policy is a distribution over the answers, not {policy}")
    if policy.shape[-1] != n:
        raise ValueError(f"a policy over {policy.shape[-1]} answers is none of a game of {n}")
    return policy


def _count(value: int, name: str) -> int:
    """`value` as an int. ValueError unless it is a whole number of at least 0."""
    if value < 0 or value != int(value):
        raise ValueError(f"{name} is a whole number that is not negative, not {value}")
    return int(value)


def _check_coefficient(name: str, value: float, *, valid: bool) -> None:
    if not (valid and isfinite(value)):
        raise ValueError(f"{name} is no coefficient of a step: {value}")
