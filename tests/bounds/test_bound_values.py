"""The bounds against golden values, their invariances, a class whose complexity is known, and the lemma behind one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from poise.bounds import BOUNDS, BoundInput
from poise.bounds.affine import LayerNorms
from poise.bounds.complexity import covering_complexity, frobenius_product, pac_bayes_complexity, spectral_product
from poise.bounds.operators import Block, Network, network_norms
from poise.bounds.pac_bayes import PacBayes, spectral_pac_bayes
from poise.bounds.rademacher import arc_bound, arc_gap, covering_bound


def chain(spectral=(2, 3), frobenius=(2.5, 4), l1=(4, 6)) -> Network:
    rows = zip(spectral, frobenius, l1, strict=True)
    return Network.chain([LayerNorms("l", s, s, "svd", f, 0, a, 5, 10) for s, f, a in rows])


def pac(network: Network, **changes: float) -> PacBayes:
    values = {"depth": 2, "width": 5, "radius": 1.1, "margin": 2, "samples": 10_000, "delta": 0.05, **changes}
    return spectral_pac_bayes(pac_bayes_complexity(network), product=spectral_product(network), **values)


def test_golden_adversarial_rademacher():
    options = {"parameters": 4 * 3 + 3 * 1, "depth": 2, "samples": 100}
    assert 10 ** arc_bound(math.log10(6), radius=1.1, **options) == pytest.approx(82.11843, abs=1e-5)
    assert 10 ** arc_bound(math.log10(6), radius=1.0, **options) == pytest.approx(82.11843 / 1.1, abs=1e-5)


def test_golden_pac_bayes():
    network = chain()
    skips = Network(network.layers, (Block((0,), ()), Block((1,), ())), torch.zeros(()), True)
    assert 10 ** pac_bayes_complexity(network) == pytest.approx(120.25)
    assert 10 ** pac_bayes_complexity(skips) == pytest.approx(244)
    assert 10 ** pac(network).shape == pytest.approx(0.4096809, abs=1e-7)


def test_the_explicit_pac_bayes_constant_by_its_formula():
    divergence = 42**2 * math.e**2 / 2 * 4 * 5 * math.log(40) * 1.1**2 * 120.25 / 4
    union = math.log(6 * 10_000 * 2 * 10_000 ** (1 / 4) / 0.05)
    found = pac(chain())
    assert 10**found.divergence == pytest.approx(divergence)
    assert 10**found.gap == pytest.approx(4 * math.sqrt((divergence + union) / 9_999))


def test_a_margin_that_no_output_reaches_gives_no_gap():
    assert pac(chain(), margin=2 * 1.1 * 6 * 0.999).gap is not None
    assert pac(chain(), margin=2 * 1.1 * 6 * 1.001).gap is None


def test_golden_cover():
    complexity = covering_complexity(chain())
    assert 10**complexity == pytest.approx(33.941125)
    found = covering_bound(complexity, lipschitz=1, radius=1.1, samples=10_000)
    assert 10**found == pytest.approx(0.3733524, abs=1e-7)
    deviation = math.sqrt(math.log(20) / 10_000)
    whole = covering_bound(complexity, lipschitz=1, radius=1.1, samples=10_000, delta=0.05)
    assert 10**whole == pytest.approx(0.3733524 + deviation, abs=1e-7)


def test_the_gap_of_the_margin_loss():
    expected = 2 * 2 / 0.5 * 82.11843 + 3 * math.sqrt(math.log(2 / 0.05) / 200)
    assert 10 ** arc_gap(math.log10(82.11843), margin=0.5, samples=100, delta=0.05) == pytest.approx(expected)


def test_rescaled_layers_leave_everything_as_it_was():
    whole, rescaled = chain(), chain((2 * 7, 3 / 7), (2.5 * 7, 4 / 7), (4 * 7, 6 / 7))
    for measure in (spectral_product, frobenius_product, pac_bayes_complexity, covering_complexity):
        assert measure(rescaled) == pytest.approx(measure(whole), rel=1e-12)


def test_a_factor_on_all_weights_is_a_factor_on_margins():
    whole, larger = chain(), chain((6, 9), (7.5, 12), (12, 18))
    assert pac_bayes_complexity(larger) - pac_bayes_complexity(whole) == pytest.approx(4 * math.log10(3))
    assert frobenius_product(larger) - frobenius_product(whole) == pytest.approx(2 * math.log10(3))
    assert pac(larger, margin=2 * 9).divergence == pytest.approx(pac(whole).divergence)


def test_four_times_the_samples_halve_the_leading_terms():
    for bound in (
        lambda n: arc_bound(3.0, parameters=10, depth=2, radius=1, samples=n),
        lambda n: covering_bound(3.0, lipschitz=1, radius=1, samples=n),
        lambda n: spectral_pac_bayes(9.0, product=3, depth=2, width=5, radius=1, margin=1, samples=n, delta=0.05).shape,
    ):
        assert bound(1000) - bound(4000) == pytest.approx(math.log10(2), abs=1e-4)


def test_products_beyond_every_float_stay_finite():
    network = chain((1e30,) * 19, (1e31,) * 19, (1e32,) * 19)
    assert spectral_product(network) == pytest.approx(570)
    found = pac(network, depth=19)
    bounds = [covering_complexity(network), found.shape, found.divergence, found.gap]
    assert all(math.isfinite(value) and value > 500 for value in bounds)


def test_a_zero_layer_has_no_complexity_and_no_nan():
    network = chain((0, 3), (0, 4), (0, 6))
    assert spectral_product(network) == -math.inf
    assert pac_bayes_complexity(network) == -math.inf
    assert covering_complexity(network) == -math.inf


def test_the_bound_holds_for_the_linear_class_whose_complexity_under_attack_is_known():
    """sup over ||w||_2 <= 1 of mean sigma_i inf over the l-inf ball of w x is exact: papers/bounds.md, section 9."""
    random = np.random.default_rng(0)
    samples, d, eps = 200, 30, 0.1
    x = random.standard_normal((samples, d))
    signs = random.choice([-1.0, 1.0], (4000, samples))
    u, c = np.abs(signs @ x / samples), eps * signs.mean(1, keepdims=True)
    clean = np.linalg.norm(u, axis=1).mean()
    attacked = np.linalg.norm(np.maximum(u - c, 0), axis=1).mean()
    assert max(clean, eps * math.sqrt(d / samples) / 2) <= attacked <= clean + eps * math.sqrt(d / samples)
    radius = np.linalg.norm(x, axis=1).max() + math.sqrt(d) * eps
    assert attacked < 10 ** arc_bound(0.0, parameters=d, depth=1, radius=radius, samples=samples)


def test_the_perturbation_lemma_on_random_networks():
    """|M_{w+u} - M_w| <= 2 e ||x|| prod s sum ||U_i|| / s_i when ||U_i|| <= s_i / L, of a margin of two classes."""
    torch.manual_seed(0)
    x = torch.randn(64, 6, dtype=torch.float64)
    for _ in range(10):
        sizes = (6, 8, 8, 3)
        layers = [nn.Linear(a, b, bias=False).double() for a, b in itertools.pairwise(sizes)]
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        network = network_norms(model, (6,))
        before = model(x)
        share = 0.0
        with torch.no_grad():
            for layer, norms in zip(layers, network.layers, strict=True):
                step = torch.randn_like(layer.weight)
                size = torch.rand(()).item() / 3
                layer.weight += size * norms.sigma_hi / torch.linalg.matrix_norm(step, ord=2) * step
                share += size
        change = model(x) - before
        moved = (change[:, 0] - change[:, 1]).abs() / x.norm(dim=1)
        assert 0 < moved.max().item() <= 2 * math.e * 10 ** spectral_product(network) * share


@pytest.mark.parametrize("bad", [{"margin": 0}, {"margin": math.nan}, {"radius": 0}, {"samples": 1}, {"delta": 1}])
def test_bounds_of_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="no bound"):
        pac(chain(), **bad)
    with pytest.raises(ValueError, match="radius"):
        arc_bound(0.0, parameters=1, depth=1, radius=0, samples=1)


def test_the_registered_bounds_are_those_of_the_functions():
    network = chain()
    inputs = BoundInput(network, radius=1.1, margin=2, samples=10_000, delta=0.05)
    expected = {"pac_bayes": pac(network).gap, "pac_bayes_shape": pac(network).shape}
    for name, product in (("arc", spectral_product(network)), ("arc_frobenius", frobenius_product(network))):
        complexity = arc_bound(product, parameters=network.parameters, depth=2, radius=1.1, samples=10_000)
        expected[name] = arc_gap(complexity, margin=2, samples=10_000, delta=0.05)
    complexity = covering_complexity(network)
    expected["covering"] = covering_bound(complexity, lipschitz=1, radius=1.1, samples=10_000, delta=0.05)
    assert {name: bound.value(inputs) for name, bound in BOUNDS.items()} == expected
    assert {name for name, bound in BOUNDS.items() if bound.is_explicit} == {"arc", "arc_frobenius", "pac_bayes"}


@pytest.mark.parametrize(
    ("homogeneous", "fixes_zero", "applicable"),
    [
        (True, True, {"arc", "arc_frobenius", "covering", "pac_bayes", "pac_bayes_shape"}),
        (False, True, {"arc", "arc_frobenius", "covering"}),
        (False, False, set()),
    ],
)
def test_a_bound_applies_where_the_activations_are_those_of_its_theorem(homogeneous, fixes_zero, applicable):
    whole = chain()
    network = Network(whole.layers, whole.path, whole.shift, homogeneous, fixes_zero)
    assert {name for name, bound in BOUNDS.items() if bound.violation(network) is None} == applicable
