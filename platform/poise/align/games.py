# ruff: noqa: N803 - P is the field's own name for a preference matrix
"""Preference games over n answers, solved exactly or by the tabular form of the self-play methods; numpy, float64.

P is a preference matrix (n, n): P[i, j] = P(answer i is preferred to answer j), so P + P.T = 1. A policy is a
distribution (n,). The game max_p min_q p' P q is symmetric and constant-sum, so its value is 1/2 (NLHF, 2312.00886).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.special import softmax

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

_PATIENCE = 1_000_000


def preferences(P: ArrayLike) -> Vector:
    """P as float64 (n, n). Raises ValueError unless it is square, in [0, 1] and P + P.T = 1."""
    matrix = np.asarray(P, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"a preference matrix is square, not {matrix.shape}")
    if not ((matrix >= 0) & (matrix <= 1)).all() or np.abs(matrix + matrix.T - 1).max() > 1e-9:
        raise ValueError("a preference matrix holds probabilities with P[i, j] + P[j, i] = 1, and 1/2 on its diagonal")
    return matrix


def exploitability(P: ArrayLike, p: ArrayLike) -> float:
    """max(P p) - 1/2: by how much the best response to the policy p wins beyond the value of the game; 0 at a NE."""
    return float((preferences(P) @ _policy(p)).max() - 0.5)


def nash_equilibrium(P: ArrayLike) -> Vector:
    """An equilibrium of the game by linear programming: the p that maximises v subject to p' (P - 1/2) >= v."""
    matrix = preferences(P)
    n = len(matrix)
    solution = linprog(
        c=np.r_[np.zeros(n), -1.0],
        A_ub=np.c_[-(matrix - 0.5).T, np.ones(n)],
        b_ub=np.zeros(n),
        A_eq=np.r_[np.ones(n), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
    )
    if not solution.success:
        raise ValueError(f"the linear program of the game was not solved: {solution.message}")
    p = np.maximum(solution.x[:n], 0)
    return np.asarray(p / p.sum())


def mirror_step(p: Vector, gain: Vector, magnet: Vector, alpha: float, eta: float) -> Vector:
    """argmax_q <q, gain> - alpha KL(q||magnet) - KL(q||p) / eta, which is (p magnet^(eta alpha) e^(eta gain))^(1 / (1 +
    eta alpha)), normalised. All (n,)."""
    with np.errstate(divide="ignore"):  # an answer of probability 0 keeps it
        logits = np.log(p) + eta * alpha * np.log(magnet) + eta * gain
    return np.asarray(softmax(logits / (1 + eta * alpha)))


def magnetic_mirror_descent(
    P: ArrayLike, magnet: ArrayLike, *, alpha: float, eta: float, steps: int, start: ArrayLike | None = None
) -> Vector:
    """`steps` steps of MMD in self-play from `start` (the magnet by default); (n,).

    With eta <= alpha / L^2, L = max|P - 1/2|, KL(p*||p_k) <= (1 + eta alpha)^-k KL(p*||p_0) for the equilibrium p* of
    the game regularised towards the magnet (Sokota et al., ICLR 2023, theorem 3.4).
    """
    matrix, centre = preferences(P), _policy(magnet)
    p = centre if start is None else _policy(start)
    for _ in range(steps):
        p = mirror_step(p, matrix @ p, centre, alpha, eta)
    return p


def mpo(P: ArrayLike, start: ArrayLike, *, alpha: float, eta: float, period: int, magnets: int) -> Vector:
    """Magnetic preference optimization: MMD whose magnet becomes the policy after every `period` steps; (n,).

    It approaches the equilibrium of the game itself when each period comes near its regularised one; with period 1 the
    magnet is the policy, which is plain mirror descent and does not converge (2410.16714, lemma 3.3).
    """
    p = _policy(start)
    for _ in range(magnets):
        p = magnetic_mirror_descent(P, p, alpha=alpha, eta=eta, steps=period)
    return p


def regularised_nash(P: ArrayLike, ref: ArrayLike, tau: float) -> Vector:
    """The one equilibrium p = ref exp(P p / tau) / Z of the game with -tau KL(p||ref) + tau KL(q||ref); (n,)."""
    matrix, anchor = preferences(P), _policy(ref)
    return _fixed_point(lambda p: mirror_step(p, matrix @ p, anchor, tau, 4 * tau), anchor)


def nash_rs(P: ArrayLike, ref: ArrayLike, tau: float) -> Vector:
    """The fixed point of Nash-RS (2503.10990 v1): a policy that plays against what rejection accepts; (n,).

    Reward (P q) / tau and KL coefficient 1, in units of tau; the opponents q are `accepted`. At the fixed point q = p,
    the regularised equilibrium.
    """
    matrix, anchor = preferences(P), _policy(ref)
    return _fixed_point(
        lambda p: mirror_step(p, matrix @ accepted(matrix, p, anchor, tau), anchor, tau, 4 * tau), anchor
    )


def accepted(P: Vector, p: Vector, ref: Vector, tau: float) -> Vector:
    """ref exp(-g / tau) / Z, g[k] = P(p > answer k): proposals of ref, kept with probability exp(-g / tau); (n,)."""
    return np.asarray(softmax(np.log(ref) - (p @ P) / tau))


def _fixed_point(update: Callable[[Vector], Vector], p: Vector) -> Vector:
    """Iterate to machine precision: steps of 4 tau <= tau / L^2 contract, since L <= 1/2."""
    for _ in range(_PATIENCE):
        last, p = p, update(p)
        if np.abs(p - last).max() < 1e-15:
            return p
    raise ValueError(f"no fixed point after {_PATIENCE:,} steps: tau is too small for this game")


def _policy(p: ArrayLike) -> Vector:
    policy = np.asarray(p, dtype=np.float64)
    if policy.ndim != 1 or (policy < 0).any() or abs(policy.sum() - 1) > 1e-9:
        raise ValueError(f"a policy is a distribution over the answers, not {policy}")
    return policy
