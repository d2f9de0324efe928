"""Projections against their definitions, random starts and steps against theirs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.robust.attacks import perturb
from poise.robust.noise import Noise
from poise.robust.threats import StackedThreats, Threat, project_l1_ball

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


def _length(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ord=ORDER[norm], dim=1)


def _bisected(x: Tensor, v: Tensor, radius: float) -> Tensor:
    """The page's definition of the joint projection, by bisection in float64."""
    room = torch.where(v > 0, 1 - x, x)
    low, high = torch.zeros(len(v), 1, dtype=v.dtype), v.abs().amax(1, keepdim=True)
    for _ in range(200):
        t = (low + high) / 2
        long = torch.minimum((v.abs() - t).clamp(min=0), room).sum(1, keepdim=True) > radius
        low, high = torch.where(long, t, low), torch.where(long, high, t)
    inside = torch.minimum(v.abs(), room).sum(1, keepdim=True) <= radius
    return v.sign() * torch.minimum((v.abs() - torch.where(inside, 0, high)).clamp(min=0), room)


@st.composite
def _instances(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """Images with pixels at the box's sides, two perturbations with ties and zeros, a radius down to zero."""
    n, d = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = (1.6 * torch.rand(n, d, generator=generator, dtype=torch.double) - 0.3).clamp(0, 1)
    scale = draw(st.sampled_from([0.01, 0.3, 3.0, 1000.0]))
    u, v = scale * torch.randn(2, n, d, generator=generator, dtype=torch.double)
    if draw(st.booleans()):
        u, v = (4 * u / scale).round() * scale / 4, (2 * v / scale).round() * scale / 2
    return x, u, v, draw(st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0, 4.0, 50.0]))


def test_l1_ball_example_of_the_page() -> None:
    out = project_l1_ball(torch.tensor([[3.0, -2.0, 0.5, 0.0]]), 2.0)
    torch.testing.assert_close(out, torch.tensor([[1.5, -0.5, 0.0, 0.0]]))


def test_l1_joint_projection_example_of_the_page_keeps_the_whole_budget() -> None:
    x, wanted = torch.tensor([[0.9, 0.5]]), torch.tensor([[1.0, 0.5]])
    torch.testing.assert_close(Threat("l1", 0.5).project(x, wanted), torch.tensor([[0.1, 0.4]]))


@given(_instances())
@settings(deadline=None, max_examples=50)
def test_l1_projection_is_the_bisected_one(instance: tuple[Tensor, Tensor, Tensor, float]) -> None:
    x, v, _, radius = instance
    torch.testing.assert_close(Threat("l1", radius).project(x, v), _bisected(x, v, radius), rtol=1e-9, atol=1e-9)


@given(_instances())
@settings(deadline=None, max_examples=50)
def test_l1_ball_projection_has_duchis_closed_form(instance: tuple[Tensor, Tensor, Tensor, float]) -> None:
    _, v, _, radius = instance
    out = project_l1_ball(v, radius)
    for got, row in zip(out, v, strict=True):
        if row.abs().sum() <= radius:
            assert torch.equal(got, row)
            continue
        a = row.abs().sort(descending=True).values
        theta = (a.cumsum(0) - radius) / torch.arange(1, len(a) + 1)
        rho = int((a > theta).nonzero().max()) if radius > 0 else 0
        torch.testing.assert_close(got, row.sign() * (row.abs() - theta[rho]).clamp(min=0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@given(instance=_instances())
@settings(deadline=None, max_examples=40)
def test_projection_is_feasible_idempotent_and_non_expansive(
    norm: str, instance: tuple[Tensor, Tensor, Tensor, float]
) -> None:
    x, u, v, eps = instance
    threat = Threat(norm, eps)
    pu, pv = threat.project(x, u), threat.project(x, v)
    assert (_length(pu, norm) <= eps * (1 + 1e-9)).all()
    assert ((x + pu >= 0) & (x + pu <= 1)).all()
    torch.testing.assert_close(threat.project(x, pu), pu, rtol=1e-9, atol=1e-12)
    assert ((pu - pv).norm(dim=1) <= (u - v).norm(dim=1) * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("norm", ["linf", "l1"])
@given(instance=_instances())
@settings(deadline=None, max_examples=40)
def test_projection_is_the_nearest_point(norm: str, instance: tuple[Tensor, Tensor, Tensor, float]) -> None:
    """The obtuse angle criterion: (v - Pv) . (z - Pv) <= 0 for every feasible z characterises the projection."""
    x, v, other, eps = instance
    threat = Threat(norm, eps)
    nearest, z = threat.project(x, v), threat.project(x, other)
    residual = v - nearest
    assert ((residual * (z - nearest)).sum(1) <= 1e-9 * (1 + residual.norm(dim=1))).all()


@pytest.mark.parametrize("norm", NORMS)
def test_points_inside_come_back_bit_for_bit_and_those_outside_reach_the_sphere(norm: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = 0.4 + 0.2 * torch.rand(6, 3, 4, 4, generator=generator)
    delta = 0.2 * torch.rand(6, 3, 4, 4, generator=generator) - 0.1
    delta[3:] *= 1e-3
    eps = 0.8 * float(_length(delta[:3], norm).min())
    out = Threat(norm, eps).project(x, delta)
    assert torch.equal(out[3:], delta[3:])
    torch.testing.assert_close(_length(out[:3], norm), torch.full((3,), eps), rtol=1e-5, atol=0)


def test_l1_projection_is_exact_to_float32_at_the_size_of_an_image() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(8, 3, 32, 32, generator=generator)
    v = torch.randn(8, 3, 32, 32, generator=generator)
    out = Threat("l1", 12.0).project(x, v)
    exact = _bisected(x.double().flatten(1), v.double().flatten(1), 12.0).view_as(v)
    assert (out - exact).abs().max() < 1e-6
    torch.testing.assert_close(_length(out, "l1"), torch.full((8,), 12.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 2, 4, 4)])
def test_random_start_is_feasible_seeded_and_leaves_the_global_stream_alone(norm: str, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    threat, before = Threat(norm, 0.3), torch.get_rng_state()
    first, second = (threat.random_start(x, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, threat.random_start(x, torch.Generator().manual_seed(10)))
    assert first.shape == x.shape
    assert (_length(first, norm) <= 0.3 * (1 + 1e-5)).all()
    assert ((x + first >= 0) & (x + first <= 1)).all()
    assert torch.equal(threat.project(x, first), first) or norm != "linf"


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_is_uniform_in_the_ball(norm: str) -> None:
    """In dimension d, (length / eps)^d is uniform, and no direction is preferred."""
    x, eps, d = torch.full((20_000, 3), 0.5), 0.4, 3
    delta = Threat(norm, eps).random_start(x, torch.Generator().manual_seed(2))
    quantile = ((_length(delta, norm) / eps) ** d).sort().values
    expected = (torch.arange(len(x)) + 0.5) / len(x)
    assert (quantile - expected).abs().max() < 1.63 / math.sqrt(len(x))  # Kolmogorov-Smirnov at one per cent
    assert delta.mean(0).abs().max() < 5 * eps / math.sqrt(len(x))
    torch.testing.assert_close(delta.var(0), delta.var(0).mean().expand(d), rtol=0.05, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e20]))
@settings(deadline=None, max_examples=25)
def test_a_step_has_its_length_and_is_the_steepest(norm: str, seed: int, scale: float) -> None:
    """No other step of that length gains more: its gain is size times the dual norm of the gradient."""
    grad = scale * torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(seed))
    step = Threat(norm, 1.0).steepest_step(grad, 0.3)
    torch.testing.assert_close(_length(step, norm), torch.full((4,), 0.3))
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    gain = (step * (grad / scale)).flatten(1).sum(1)
    torch.testing.assert_close(gain, 0.3 * _length(grad / scale, dual), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_gives_a_zero_step(norm: str) -> None:
    grad = torch.zeros(3, 4)
    grad[1] = torch.tensor([0.0, 2.0, 0.0, -1.0])
    step = Threat(norm, 1.0).steepest_step(grad, 0.5, at=torch.full((3, 4), 0.5), sparsity=2)
    assert torch.equal(step[[0, 2]], torch.zeros(2, 4))
    assert step[1].abs().sum() > 0


def test_an_l1_step_passes_over_blocked_pixels_and_shares_its_length() -> None:
    grad = torch.tensor([[5.0, -4.0, 3.0, -2.0, 1.0]])
    at = torch.tensor([[1.0, 0.0, 0.5, 0.5, 0.5]])
    step = Threat("l1", 1.0).steepest_step(grad, 0.6, at=at, sparsity=2)
    torch.testing.assert_close(step, torch.tensor([[0.0, 0.0, 0.3, -0.3, 0.0]]))


def test_an_l1_step_spends_on_the_next_pixel_what_a_nearly_blocked_one_cannot_use() -> None:
    grad = torch.tensor([[5.0, -4.0, 3.0, -2.0]])
    at = torch.tensor([[0.9, 0.05, 0.5, 0.5]])
    step = Threat("l1", 1.0).steepest_step(grad, 0.6, at=at, sparsity=1)
    torch.testing.assert_close(step, torch.tensor([[0.1, -0.05, 0.45, 0.0]]))


def test_an_l1_step_takes_a_count_for_each_example_and_at_most_all_pixels() -> None:
    grad = torch.tensor([[4.0, 3.0, 2.0], [4.0, 3.0, 2.0], [4.0, 3.0, 2.0]])
    step = Threat("l1", 1.0).steepest_step(grad, 0.6, sparsity=torch.tensor([1, 2, 99]))
    torch.testing.assert_close(step, torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.3, 0.0], [0.2, 0.2, 0.2]]))


@pytest.mark.parametrize(("norm", "eps"), [("l3", 1.0), ("l1", -1.0), ("l2", math.nan), ("linf", math.inf)])
def test_a_malformed_threat_is_refused(norm: str, eps: float) -> None:
    with pytest.raises(ValueError, match=r"norm|eps"):
        Threat(norm, eps)


def test_each_block_of_examples_faces_its_own_threat(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    (x, y), parts = images, (Threat("l2", 0.7), Threat("l1", 3.0), Threat("linf", 0.05))
    noise = Noise.of(0, "beside", range(3 * len(x)))
    points = perturb(
        small_net, torch.cat([x] * 3), torch.cat([y] * 3), StackedThreats(parts=parts), steps=3, sparsity=4, noise=noise
    )
    for index, (part, block) in enumerate(zip(parts, points.chunk(3), strict=True)):
        own = noise.select(torch.arange(index * len(x), (index + 1) * len(x)))
        alone = perturb(small_net, x, y, part, steps=3, sparsity=4, noise=own)
        torch.testing.assert_close(block, alone, rtol=1e-4, atol=1e-6)
