"""Eigenbases against numpy, subspace attacks against closed forms and linear programs, codes that are attacked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import norm as normal
from torch import Tensor, nn

from poise.robust.attacks import perturb, pgd
from poise.robust.manifold import DecodedClassifier, Eigenbasis, EigenspaceThreat, Latent, eigenbasis, subspace_residual
from poise.robust.threats import Threat

ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


class Binary(nn.Module):
    """Logits (-z/2, z/2) for z = <w, x> + b, so that the margin of label 0 is -z."""

    def __init__(self, w: Tensor, b: float | Tensor = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.w + self.b
        return torch.stack([-z / 2, z / 2], 1)


def rise(logits: Tensor, y: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def basis_of(seed: int, rank: int, shape: tuple[int, ...] = (30,), classes: int = 1) -> Eigenbasis:
    y = torch.arange(60 * classes) % classes
    return eigenbasis(drawn(seed, len(y), *shape), y, rank)


@pytest.mark.parametrize(("n", "shape"), [(80, (2, 3, 4)), (15, (1, 5, 6))])
def test_each_basis_is_numpys(n: int, shape: tuple[int, ...]) -> None:
    """With more images than pixels, and with fewer."""
    x, y = drawn(0, 2 * n, *shape), torch.arange(2 * n) % 2
    found = eigenbasis(x.float(), y, 7)
    for label in (0, 1):
        images = x.float()[y == label].flatten(1).double().numpy()
        _, singular, directions = np.linalg.svd(images - images.mean(0), full_matrices=True)
        assert np.allclose(found.mean[label], images.mean(0), rtol=0, atol=1e-14)
        assert np.allclose(found.variance[label], singular[:7] ** 2 / (n - 1), rtol=1e-11)
        assert np.allclose(found.total[label], images.var(0, ddof=1).sum())
        assert np.allclose(np.abs(np.sum(directions[:7] * found.directions[label].numpy(), 1)), 1, atol=1e-10)
    assert found.explained == pytest.approx((found.variance.sum(1) / found.total).mean().item())


def test_a_shared_basis_is_that_of_all_images_together() -> None:
    x, y = drawn(0, 50, 9), torch.arange(50) % 5
    shared, one = eigenbasis(x, y, 4, shared=True), eigenbasis(x, torch.zeros_like(y), 4)
    assert torch.equal(shared.directions, one.directions)
    assert shared.rank == 4
    assert shared.groups(y) == [(slice(None), 0)]


@pytest.mark.parametrize(
    ("labels", "what"), [([0] * 6 + [1] * 4, "class 1 has 4"), ([0] * 10 + [2] * 10, "class 1 has 0")]
)
def test_directions_that_would_be_arbitrary_are_refused(labels: list[int], what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} images, which span"):
        eigenbasis(drawn(0, len(labels), 8), torch.tensor(labels), 4)


def test_pixels_that_never_vary_span_nothing() -> None:
    x = torch.cat([drawn(0, 40, 3), torch.full((40, 5), 0.3, dtype=torch.double)], 1)
    assert eigenbasis(x, torch.zeros(40, dtype=torch.long), 3).explained == pytest.approx(1)
    with pytest.raises(ValueError, match="span 3 directions: 4 are too many"):
        eigenbasis(x, torch.zeros(40, dtype=torch.long), 4)


def test_the_distance_from_an_eigenspace_is_the_reconstruction_error() -> None:
    x, y = drawn(0, 40, 12), torch.arange(40) % 2
    basis = eigenbasis(x, y, 5)
    total = basis.distance(x, y).square()
    for label in (0, 1):
        left = basis.total[label] - basis.variance[label].sum()
        assert total[y == label].sum() == pytest.approx(left.item() * 19, rel=1e-9)


@given(seed=st.integers(0, 1000), rank=st.integers(1, 29), eps=st.floats(0.001, 0.4), off=st.booleans())
@settings(deadline=None, max_examples=20, derandomize=True)
def test_the_best_l2_perturbation_of_a_linear_model_gains_eps_times_the_projected_gradient(
    seed: int, rank: int, eps: float, off: bool
) -> None:
    """eps * ||B g|| within, eps * ||g - B^T B g|| off the eigenspace; nothing of it leaves the subspace."""
    basis, w, y = basis_of(seed, rank), drawn(seed + 1, 30) - 0.5, torch.zeros(6, dtype=torch.long)
    x = torch.full((6, 30), 0.5, dtype=torch.double)  # the box is out of reach
    threat = EigenspaceThreat("l2", eps, basis=basis, labels=y, off=off)
    found = perturb(Binary(w), x, y, threat, steps=2, random_start=False, loss=rise) - x
    inside = basis.directions[0] @ w
    best = w - basis.directions[0].T @ inside if off else inside
    assert torch.allclose(found @ w, eps * best.norm().expand(6), rtol=1e-9)
    left = subspace_residual(x, x + found, threat)
    assert left.residual.max() < 1e-12
    assert left.share.max() < 1e-12 / eps
    assert left.clipped.max() == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("off", [False, True])
def test_linf_within_a_subspace_comes_near_the_optimum_of_the_linear_program(seed: int, off: bool) -> None:
    """max <w, delta> with A delta = 0 and |delta| <= eps, for forbidden directions A: eps * min_v ||w - A^T v||_1."""
    rank, eps = 8, 0.1
    basis, w, y = basis_of(seed, rank), drawn(seed + 1, 30) - 0.5, torch.zeros(3, dtype=torch.long)
    directions = basis.directions[0].numpy()
    forbidden = directions if off else np.linalg.svd(directions)[2][rank:]
    solved = linprog(-w.numpy(), A_eq=forbidden, b_eq=np.zeros(len(forbidden)), bounds=(-eps, eps))
    threat = EigenspaceThreat("linf", eps, basis=basis, labels=y, off=off)
    x = 0.4 + 0.2 * drawn(seed + 2, 3, 30)
    found = perturb(Binary(w), x, y, threat, steps=40, random_start=False, loss=rise) - x
    assert found.abs().max() <= eps * (1 + 1e-12)
    assert np.abs(forbidden @ found.numpy().T).max() < 1e-12
    gains = (found @ w).numpy() / -solved.fun
    assert gains.max() <= 1 + 1e-9
    assert gains.min() > 0.95


@pytest.mark.parametrize("off", [False, True])
def test_l1_within_a_subspace_comes_nearer_to_the_optimum_of_the_linear_program_with_more_steps(off: bool) -> None:
    """max <w, delta> with A delta = 0 and ||delta||_1 <= eps, as a program in the positive and negative parts."""
    rank, eps, size = 8, 0.6, 30
    basis, w, y = basis_of(0, rank, (size,)), drawn(1, size) - 0.5, torch.zeros(3, dtype=torch.long)
    directions = basis.directions[0].numpy()
    forbidden = directions if off else np.linalg.svd(directions)[2][rank:]
    solved = linprog(
        np.concatenate([-w.numpy(), w.numpy()]),
        A_eq=np.hstack([forbidden, -forbidden]),
        b_eq=np.zeros(len(forbidden)),
        A_ub=np.ones((1, 2 * size)),
        b_ub=[eps],
    )
    threat = EigenspaceThreat("l1", eps, basis=basis, labels=y, off=off)
    x, best = torch.full((3, size), 0.5, dtype=torch.double), -solved.fun
    shares = []
    for steps in (5, 20, 60):
        # the margin is out of reach, so that what comes back is the last point, the most refined one
        found = pgd(Binary(w, -1000.0), x, y, threat, steps=steps, loss=rise).adversarial - x
        assert found.abs().sum(1).max() <= eps * (1 + 1e-9)
        assert np.abs(forbidden @ found.numpy().T).max() < 1e-12
        shares.append((found @ w).min().item() / best)
    assert shares == sorted(shares)
    assert 0.99 < shares[-1] <= 1 + 1e-9


def test_a_subspace_that_spans_everything_is_no_constraint() -> None:
    """The same l2 attack step by step, and nothing is left off it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = drawn(0, 20, 12), torch.arange(20) % 3
    basis = eigenbasis(drawn(1, 60, 12), torch.arange(60) % 3, 12)
    options = {"steps": 10, "restarts": 2}
    whole = pgd(net, x, y, Threat("l2", 0.5), **options)
    within = pgd(net, x, y, EigenspaceThreat("l2", 0.5, basis=basis, labels=y), **options)
    assert torch.equal(whole.correct, within.correct)
    assert torch.allclose(whole.adversarial, within.adversarial, atol=1e-9)
    off = pgd(net, x, y, EigenspaceThreat("l2", 0.5, basis=basis, labels=y, off=True), **options)
    assert torch.allclose(off.adversarial, x, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_is_orthogonal_to_the_class_means_fools_nobody(norm: str) -> None:
    """A linear model along the difference of the means, and images that vary in every direction but that one."""
    difference = torch.zeros(20, dtype=torch.double)
    difference[:4] = 0.1
    spread = 0.3 * (drawn(0, 200, 20) - 0.5) * (difference == 0)
    y = torch.arange(200) % 2
    x = 0.5 + spread + difference * (2 * y[:, None] - 1)
    net = Binary(difference, -0.5 * difference.sum())
    eps = {"linf": 0.2, "l2": 0.4, "l1": 1.0}[norm]
    on = EigenspaceThreat(norm, eps, basis=eigenbasis(x, y, 16), labels=y)
    assert pgd(net, x, y, on, steps=20).correct.all()
    off = EigenspaceThreat(norm, eps, basis=on.basis, labels=y, off=True)
    assert not pgd(net, x, y, off, steps=20).correct.any()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@given(seed=st.integers(0, 1000), share=st.floats(0, 1.5), off=st.booleans(), rank=st.integers(1, 20))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_every_point_lies_in_the_ball_and_the_box_and_near_the_subspace(
    norm: str, seed: int, share: float, off: bool, rank: int
) -> None:
    eps = share * {"linf": 0.3, "l2": 1.5, "l1": 4.0}[norm]
    x, y = drawn(seed, 8, 2, 3, 4).mul(1.6).sub(0.3).clamp(0, 1), torch.arange(8) % 2
    threat = EigenspaceThreat(norm, eps, basis=basis_of(seed, rank, (2, 3, 4), classes=2), labels=y, off=off)
    found = perturb(Binary(drawn(seed + 1, 24) - 0.5), x, y, threat, steps=4, noise=torch.Generator().manual_seed(seed))
    delta = (found - x).flatten(1)
    assert torch.linalg.vector_norm(delta, ord=ORDER[norm], dim=1).max() <= eps * (1 + 1e-9) + 1e-14
    assert found.min() >= 0
    assert found.max() <= 1
    left = subspace_residual(x, found, threat)
    for row, label in enumerate(y):
        directions = threat.basis.directions[label]
        inside = delta[row] @ directions.T
        expected = inside.norm() if off else (delta[row] - inside @ directions).norm()
        assert left.residual[row] == pytest.approx(expected.item(), abs=1e-12)
        assert left.share[row] <= 1 + 1e-12


def test_where_the_box_is_in_the_way_the_residual_says_so() -> None:
    basis, y = basis_of(0, 5), torch.zeros(4, dtype=torch.long)
    x = torch.zeros(4, 30, dtype=torch.double)
    threat = EigenspaceThreat("l2", 0.5, basis=basis, labels=y)
    left = subspace_residual(x, perturb(Binary(drawn(1, 30) - 0.5), x, y, threat, steps=5), threat)
    assert left.share.min() > 0.01
    assert left.clipped.min() > 0


def test_each_example_is_attacked_in_the_eigenspace_of_its_own_class_whoever_is_beside_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)).double()
    x, basis = 0.3 + 0.4 * drawn(0, 60, 2, 3, 4), basis_of(1, 6, (2, 3, 4), classes=3)
    y = (net(x) - net(x).mean(0)).argmax(1)
    net[1].bias.data -= net(x).mean(0)
    result = pgd(net, x, y, EigenspaceThreat("l2", 0.2, basis=basis, labels=y), steps=5, restarts=3)
    fooled = ~result.correct
    assert 10 < fooled.sum() < 50
    for label in range(3):
        rows = fooled & (y == label)
        shares = [
            subspace_residual(
                x[rows], result.adversarial[rows], EigenspaceThreat("l2", 0.2, basis=basis, labels=0 * y[rows] + other)
            ).share
            for other in range(3)
        ]
        assert len(shares[0]) > 1
        assert [share.max() < 1e-12 for share in shares] == [other == label for other in range(3)]
    alone = pgd(
        net, x[7:8], y[7:8], EigenspaceThreat("l2", 0.2, basis=basis, labels=y[7:8]), steps=5, random_start=False
    )
    beside = pgd(net, x, y, EigenspaceThreat("l2", 0.2, basis=basis, labels=y), steps=5, random_start=False)
    assert torch.allclose(alone.adversarial, beside.adversarial[7:8], atol=1e-12)


def test_labels_that_have_no_eigenspace_are_refused() -> None:
    threat = EigenspaceThreat("l2", 0.1, basis=basis_of(0, 3, classes=2), labels=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="labels go up to 2 and there are eigenspaces of 2 classes"):
        threat.project(drawn(0, 2, 30), torch.zeros(2, 30, dtype=torch.double))


@pytest.mark.parametrize("off", [False, True])
def test_robust_error_of_gaussian_classes_is_the_closed_form(off: bool) -> None:
    """Two classes N(+-mu, Sigma) and a linear w: ncdf((eps G - w'mu) / sqrt(w' Sigma w)) with G = ||P_S w||_2."""
    d, n, eps = 10, 4000, 0.02
    generator = torch.Generator().manual_seed(0)
    factor = 0.05 * torch.randn(d, d, generator=generator, dtype=torch.double) / math.sqrt(d)
    mu, w = 0.02 * torch.randn(2, d, generator=generator, dtype=torch.double)
    mu = mu.abs() * w.sign()
    noise = torch.randn(n, d, generator=generator, dtype=torch.double) @ factor.T
    y = torch.arange(n) % 2
    x = 0.5 + noise + mu * (2 * y[:, None] - 1)
    basis = eigenbasis(x, y, 4)
    directions = torch.linalg.svd(factor.T).Vh[:4]
    basis = Eigenbasis(basis.mean, directions.repeat(2, 1, 1), basis.variance, basis.total)
    projected = directions @ w
    gain = math.sqrt(w @ w - projected @ projected) if off else projected.norm().item()
    expected = normal.cdf((eps * gain - w @ mu) / (factor.T @ w).norm())
    result = pgd(Binary(w, -0.5 * w.sum()), x, y, EigenspaceThreat("l2", eps, basis=basis, labels=y, off=off), steps=2)
    error = 1 - result.correct.double().mean().item()
    assert error == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))
    assert 0.05 < expected < 0.95


def code_of(seed: int, n: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % classes
    return torch.cat([drawn(seed, n, width) * 4 - 2, nn.functional.one_hot(y, classes).double()], 1), y


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_an_identity_decoder_codes_are_attacked_like_images_without_a_box(norm: str) -> None:
    """The closed form eps * ||w||_dual; the label's part of the code, whose weights are large, never moves."""
    code, y = code_of(0, 6, 8, 2)
    w = torch.cat([drawn(1, 8) - 0.5, torch.tensor([50.0, -50.0], dtype=torch.double)])
    threat = Latent(norm, 0.7, width=8)
    found = perturb(
        DecodedClassifier(Binary(w), nn.Identity()), code, 0 * y, threat, steps=2, random_start=False, loss=rise
    )
    assert torch.equal(found[:, 8:], code[:, 8:])
    dual = w[:8].norm() if norm == "l2" else w[:8].abs().sum()
    assert torch.allclose((found - code) @ w, 0.7 * dual.expand(6), rtol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@given(seed=st.integers(0, 1000), radius=st.floats(0, 3))
@settings(deadline=None, max_examples=10, derandomize=True)
def test_attacked_codes_stay_in_their_ball_and_success_is_counted_at_what_they_decode_to(
    norm: str, seed: int, radius: float
) -> None:
    torch.manual_seed(seed)
    decoder = nn.Sequential(nn.Linear(7, 12), nn.Sigmoid()).double()
    classifier = nn.Linear(12, 3).double()
    code, y = code_of(seed, 12, 4, 3)
    result = pgd(DecodedClassifier(classifier, decoder), code, y, Latent(norm, radius, width=4), steps=3, restarts=2)
    moved = result.adversarial - code
    assert torch.linalg.vector_norm(moved, ord=ORDER[norm], dim=1).max() <= radius * (1 + 1e-9) + 1e-14
    assert torch.equal(result.adversarial[:, 4:], code[:, 4:])
    assert torch.equal(classifier(decoder(result.adversarial)).argmax(1) == y, result.correct)


def test_at_radius_zero_the_attack_on_codes_is_the_accuracy_on_reconstructions() -> None:
    torch.manual_seed(0)
    decoder, classifier = nn.Linear(7, 12).double(), nn.Linear(12, 3).double()
    code, y = code_of(0, 30, 4, 3)
    result = pgd(DecodedClassifier(classifier, decoder), code, y, Latent("linf", 0.0, width=4), steps=3)
    assert torch.equal(result.correct, classifier(decoder(code)).argmax(1) == y)
    assert torch.equal(result.adversarial, code)


def test_a_latent_ball_in_l1_is_refused() -> None:
    with pytest.raises(ValueError, match="linf or l2"):
        Latent("l1", 1.0, width=3)
