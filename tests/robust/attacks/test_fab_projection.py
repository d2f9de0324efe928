"""The shortest step onto a hyperplane inside the box, against linear programs and the optimality conditions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from poise.robust.attacks.fab_projection import Hyperplanes

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


def _linear_program(norm: str, w: np.ndarray, point: np.ndarray, rise: float) -> float:
    """The least linf or l1 norm of a step u - v with u, v >= 0, w . (u - v) = rise and point + u - v in the box."""
    d, scale = len(w), max(np.abs(w).max(), 1e-300)
    room = [(0, 1 - p) for p in point] + [(0, p) for p in point]
    plane = np.concatenate([w, -w])[None] / scale
    if norm == "l1":
        found = linprog(np.ones(2 * d), A_eq=plane, b_eq=[rise / scale], bounds=room)
    else:
        longest = np.append(np.zeros(2 * d), 1)
        below = np.hstack([np.eye(2 * d), -np.ones((2 * d, 1))])
        plane, room = np.append(plane, [[0]], axis=1), [*room, (0, None)]
        found = linprog(longest, A_ub=below, b_ub=np.zeros(2 * d), A_eq=plane, b_eq=[rise / scale], bounds=room)
    assert found.status == 0
    return float(found.fun)


def _dual_bisection(w: Tensor, point: Tensor, rise: float) -> float:
    """The least l2 norm: by duality the step is the multiple t w clipped to the box, with w . step = rise."""
    step = lambda t: torch.minimum(torch.maximum(t * w, -point), 1 - point)  # noqa: E731
    low, high = -1e12, 1e12
    for _ in range(300):
        t = (low + high) / 2
        low, high = (t, high) if float((w * step(t)).sum()) < rise else (low, t)
    return float(step(high).norm())


@st.composite
def _instances(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Points (N, d) with pixels at the box's sides, normals with zeros, ties and many magnitudes, reachable rises."""
    n, d = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    point = (1.6 * torch.rand(n, d, generator=generator, dtype=torch.double) - 0.3).clamp(0, 1)
    w = torch.randn(n, d, generator=generator, dtype=torch.double)
    shape = draw(st.sampled_from(["normal", "ties", "wide", "zero"]))
    if shape == "ties":
        w = (2 * w).round() / 2
    elif shape == "wide":
        w = w.sign() * 10 ** (3 * w - 3).clamp(-6, 2)
    elif shape == "zero":
        w = w * (torch.rand(n, d, generator=generator) < 0.5)
    side = draw(st.sampled_from([-1.0, 1.0]))
    most = (w.abs() * torch.where(side * w > 0, 1 - point, point)).sum(1)
    return point, w, side * draw(st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.9, 0.999])) * most


@pytest.mark.parametrize("norm", NORMS)
@given(instance=_instances())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_the_step_reaches_the_hyperplane_in_the_box_and_no_shorter_one_does(
    norm: str, instance: tuple[Tensor, Tensor, Tensor]
) -> None:
    point, w, rise = instance
    step = Hyperplanes(w, norm).reach(point, rise)
    torch.testing.assert_close((w * step).sum(1), rise, rtol=1e-9, atol=1e-12)
    assert ((point + step >= -1e-12) & (point + step <= 1 + 1e-12)).all()
    for row in range(len(point)):
        length = float(torch.linalg.vector_norm(step[row], ord=ORDER[norm]))
        if norm == "l2":
            least = _dual_bisection(w[row], point[row], float(rise[row]))
        else:
            least = _linear_program(norm, w[row].numpy(), point[row].numpy(), float(rise[row]))
        assert length == pytest.approx(least, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_a_hyperplane_out_of_reach_gives_the_corner_nearest_to_it_and_a_zero_normal_no_step(norm: str) -> None:
    point, w = torch.tensor([[0.2, 0.5, 0.0]]).expand(3, 3), torch.tensor([[1.0, -2.0, 0.0], [0.0] * 3, [1e-42] * 3])
    step = Hyperplanes(w, norm).reach(point, torch.tensor([10.0, 1.0, 1.0]))
    torch.testing.assert_close(step[:2], torch.tensor([[0.8, -0.5, 0.0], [0.0, 0.0, 0.0]]))
    assert step.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_many_pixels_in_float32_reach_the_hyperplane(norm: str) -> None:
    """Near the far corner, with gradients over eight decades, Newton's method needs the most rounds."""
    generator = torch.Generator().manual_seed(0)
    point = torch.rand(20, 3072, generator=generator)
    w = 10 ** (-8 * torch.rand(20, 3072, generator=generator)) * (point - 0.5).sign()
    most = (w.abs() * torch.where(w > 0, 1 - point, point)).sum(1)
    for share in (1e-4, 0.3, 0.99):
        step = Hyperplanes(w, norm).reach(point, share * most)
        torch.testing.assert_close((w * step).sum(1), share * most, rtol=1e-4, atol=0)
