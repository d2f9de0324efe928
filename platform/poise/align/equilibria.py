"""The equilibria of a symmetric zero-sum game, and the one of them that has the largest entropy; numpy, float64.

The game has the margins M = P - 1/2, skew-symmetric (n, n); p is an equilibrium if p' M >= 0. The support S holds the
answers that any equilibrium plays. By complementary slackness every equilibrium p has (p' M)_j = 0 on S. So the
equilibria are the distributions on S in the null space of M_S that have p' M >= 0 outside of S.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import null_space
from scipy.optimize import linprog, minimize

__all__ = ["maximal_entropy_equilibrium"]

Vector = NDArray[np.float64]

_EXACT = 1e-9
"""The largest exploitability of an equilibrium that rounding can cause, in units of the largest margin."""


def maximal_entropy_equilibrium(margins: Vector) -> Vector:
    """The equilibrium (n,) of a game with margins (n, n) that maximises -sum p ln p. Every game has exactly one.

    Equal answers share their probability evenly, and in a game of ties alone it is uniform. ValueError if the linear
    program of the game is not solved.
    """
    n = len(margins)
    largest = float(np.abs(margins).max())
    if not largest:
        return np.full(n, 1 / n)
    scaled = margins / largest
    inside = _inner_equilibrium(scaled)
    p = _maximal_entropy(scaled, inside)
    if -(p @ scaled).min() > _EXACT:  # rounding made the support wrong: fall back to the equilibrium of the program
        p = inside
    return p


def _inner_equilibrium(margins: Vector) -> Vector:
    """An equilibrium (n,) that plays every answer which any equilibrium plays.

    Equilibria are the rays y >= 0 with y' M >= 0. The largest sum of min(y_i, 1) over them is the size of the support:
    a ray that plays an answer at all can be scaled until it plays it with weight 1.
    """
    n = len(margins)
    # variables: y (n,), then min(y, 1) (n,), whose sum is maximised; constraints: y' M >= 0, and min(y, 1) <= y
    solution = linprog(
        c=np.r_[np.zeros(n), -np.ones(n)],
        A_ub=np.block([[-margins.T, np.zeros((n, n))], [-np.eye(n), np.eye(n)]]),
        b_ub=np.zeros(2 * n),
        bounds=[(0, None)] * n + [(0, 1)] * n,
    )
    if not solution.success:
        raise ValueError(f"the linear program of the game was not solved: {solution.message}")
    ray = np.maximum(solution.x[:n], 0)
    y = np.where(solution.x[n:] > 0.5, ray, 0.0)
    return np.asarray(y / y.sum())


def _maximal_entropy(margins: Vector, inside: Vector) -> Vector:
    """From an equilibrium with the largest support to the one of largest entropy; both (n,)."""
    support = inside > 0
    kernel = null_space(margins[np.ix_(support, support)], rcond=1e-10)  # (s, d)
    if not kernel.size:
        return inside
    start = kernel @ (kernel.T @ inside[support])  # projected, since the program is exact to 1e-7 only
    start /= start.sum()
    # the directions along which equilibria differ: in the null space, with a sum of 0
    free = kernel @ null_space(kernel.sum(0, keepdims=True))  # (s, d - 1)
    p = np.zeros(len(inside))
    p[support] = start
    if not free.size or (start <= 0).any():
        return p if (start >= 0).all() else inside
    p[support] = _ascend(start, free)
    outside = margins[np.ix_(support, ~support)]
    if (p[support] @ outside < -1e-12).any():
        p[support] = _ascend_within(start, free, outside)
    return p


def _ascend(p: Vector, free: Vector) -> Vector:
    """The point of largest entropy on p + span(free), by Newton's method; p > 0 (s,), free (s, d)."""
    for _ in range(200):
        slope = free.T @ np.log(p)  # (d,)
        hessian = free.T @ (free / p[:, None])  # (d, d)
        move = -free @ np.linalg.solve(hessian, slope)  # (s,)
        size = 1.0
        # halve the step until it stays inside and does not lower the entropy
        while ((p + size * move) <= 0).any() or _negative_entropy(p + size * move) > _negative_entropy(p) + 1e-16:
            size /= 2
            if size < 1e-12:
                return p
        p = p + size * move
        if np.abs(move).max() < 1e-15:
            break
    return p


def _ascend_within(p: Vector, free: Vector, outside: Vector) -> Vector:
    """As `_ascend`, with the constraint p' outside >= 0.

    `outside` (s, k) are the margins over the answers that no equilibrium plays. The variables x (d,) are the
    coefficients of `free`.
    """

    def point(x: Vector) -> Vector:
        return p + free @ x

    def gradient(x: Vector) -> Vector:
        return np.asarray(free.T @ (np.log(np.maximum(point(x), 1e-300)) + 1))

    constraints = [
        {"type": "ineq", "fun": lambda x: point(x) @ outside, "jac": lambda x: outside.T @ free},
        {"type": "ineq", "fun": point, "jac": lambda x: free},
    ]
    solution = minimize(
        lambda x: _negative_entropy(point(x)),
        np.zeros(free.shape[1]),
        jac=gradient,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    q = np.maximum(point(solution.x), 0)
    return np.asarray(q / q.sum())


def _negative_entropy(p: Vector) -> float:
    positive = p[p > 0]
    return float(positive @ np.log(positive))
