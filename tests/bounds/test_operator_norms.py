"""Norms of single layers against the dense matrix, closed forms and the cases in which usual shortcuts are no bound."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from poise.bounds import affine
from poise.bounds.affine import Affine, dense, fft_bound, kernel_bound, lanczos, measure
from poise.bounds.operators import operator_norms

CONVOLUTIONS = [
    {"c": (3, 8), "k": 3, "side": (8, 8), "padding": 1},
    {"c": (3, 8), "k": 3, "side": (8, 8), "padding": 1, "stride": 2},
    {"c": (4, 4), "k": 5, "side": (9, 9), "padding": 2},
    {"c": (2, 5), "k": 4, "side": (6, 9), "padding": 1, "stride": 2},
    {"c": (2, 3), "k": (1, 3), "side": (5, 7), "padding": (0, 1), "stride": (1, 2)},
    {"c": (4, 6), "k": 3, "side": (7, 7), "padding": 1, "groups": 2},
    {"c": (2, 3), "k": 3, "side": (9, 9), "padding": 2, "dilation": 2},
    {"c": (2, 3), "k": 3, "side": (9, 9), "padding": 2, "dilation": 2, "stride": 2},
    {"c": (3, 4), "k": 3, "side": (8, 8), "padding": 1, "dilation": 3, "stride": 2},
    {"c": (6, 5), "k": 3, "side": (2, 2), "padding": 1},
    {"c": (5, 4), "k": 1, "side": (3, 3), "stride": 2},
    {"c": (2, 3), "k": 3, "side": (1, 1), "padding": 1},
]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def make(options: dict, weight: Tensor | None = None, seed: int = 0) -> Affine:
    options = dict(options)
    (inside, outside), k, side = options.pop("c"), pair(options.pop("k")), options.pop("side")
    if weight is None:
        shape = (outside, inside // options.get("groups", 1), *k)
        weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain = {key: pair(value) if key != "groups" else value for key, value in options.items()}
    out = nn.functional.conv2d(torch.zeros(1, inside, *side, dtype=torch.float64), weight, **options).shape[1:]
    return Affine("conv", weight, (inside, *side), tuple(out), **plain)


def matrix_of(layer: Affine) -> Tensor:
    """The whole matrix, a column per unit vector."""
    basis = torch.eye(math.prod(layer.inside), dtype=torch.float64).view(-1, *layer.inside)
    return layer.apply(basis, layer.weight).flatten(1).T


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_has_the_norms_of_its_matrix(options):
    layer = make(options)
    matrix, norms = matrix_of(layer), measure(layer)
    sigma = torch.linalg.matrix_norm(matrix, ord=2).item()
    assert (norms.sigma_lo, norms.sigma_hi) == (pytest.approx(sigma, rel=1e-12),) * 2
    assert sigma <= min(fft_bound(layer), kernel_bound(layer)) * (1 + 1e-12)
    assert lanczos(layer).lower == pytest.approx(sigma, rel=1e-8)
    torch.testing.assert_close(dense(layer), matrix, rtol=1e-12, atol=1e-12)
    assert norms.frobenius == pytest.approx(torch.linalg.matrix_norm(matrix).item(), rel=1e-12)
    assert norms.l21 == pytest.approx(torch.linalg.vector_norm(matrix, dim=1).sum().item(), rel=1e-12)
    assert norms.l1 == pytest.approx(matrix.abs().sum().item(), rel=1e-12)
    assert norms.width == len(matrix)
    assert norms.parameters == layer.weight.numel()


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_the_transpose_is_the_transpose(options):
    layer = make(options)
    basis = torch.eye(math.prod(layer.outside), dtype=torch.float64).view(-1, *layer.outside)
    torch.testing.assert_close(layer.transpose(basis).flatten(1), matrix_of(layer), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [2, 4, 9])
def test_the_box_filter_has_its_closed_form(side):
    box = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    layer = make({"c": (1, 1), "k": 3, "side": (side, side), "padding": 1}, box)
    expected = ((1 + 2 * math.cos(math.pi / (side + 1))) / 3) ** 2
    assert lanczos(layer).lower == pytest.approx(expected, rel=1e-9)
    assert fft_bound(layer) == pytest.approx(1, rel=1e-12)
    if side == 4:
        assert expected == pytest.approx(0.761566885, abs=1e-9)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_delta_kernel_has_norm_one_at_any_stride(stride):
    delta = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    delta[0, 0, 1, 1] = 1
    norms = measure(make({"c": (1, 1), "k": 3, "side": (7, 7), "padding": 1, "stride": stride}, delta))
    assert norms.sigma_lo == pytest.approx(1, rel=1e-9)
    assert norms.sigma_hi == pytest.approx(1, rel=1e-12)


def test_a_one_by_one_convolution_has_the_norm_of_its_matrix_from_both_sides():
    layer = make({"c": (5, 4), "k": 1, "side": (3, 3)})
    sigma = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
    norms = measure(layer)
    assert (norms.sigma_lo, norms.sigma_hi) == (pytest.approx(sigma, rel=1e-8), pytest.approx(sigma, rel=1e-12))


@pytest.mark.parametrize(("channels", "k", "side", "seed"), [(1, 3, 4, 406), (1, 3, 4, 1243), (4, 5, 9, 21)])
def test_the_padded_grid_is_a_bound_where_the_bare_one_is_none(channels, k, side, seed):
    """Rare kernels whose zero-padded norm is above that of the circular convolution on the same grid."""
    layer = make({"c": (channels, channels), "k": k, "side": (side, side), "padding": k // 2}, seed=seed)
    kernel = torch.zeros(channels, channels, side, side, dtype=torch.float64)
    kernel[:, :, :k, :k] = layer.weight
    bare = torch.linalg.matrix_norm(torch.fft.fft2(kernel).flatten(2).movedim(2, 0), ord=2).max().item()
    assert bare * 1.01 < torch.linalg.matrix_norm(matrix_of(layer), ord=2).item() <= fft_bound(layer)


@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
def test_layers_of_few_outputs_are_enclosed(outputs):
    """With as many steps as outputs, the last entry of the bidiagonal matrix is part of the norm."""
    layer = make({"c": (3, outputs), "k": 5, "side": (5, 5)})
    sigma = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
    assert lanczos(layer).lower == pytest.approx(sigma, rel=1e-10)
    norms = measure(layer)
    assert (norms.sigma_lo, norms.sigma_hi) == (pytest.approx(sigma, rel=1e-10),) * 2


@pytest.mark.parametrize("shared", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_layers_too_large_for_their_matrix_are_enclosed_within_a_percent(monkeypatch, seed, shared):
    """Small maps, where the padded grid is far off; `shared` gives the spectrum one value that stands out."""
    layer = make({"c": (8, 8), "k": 3, "side": (4, 4), "padding": 1}, seed=seed)
    layer = replace(layer, weight=(1 - shared) * layer.weight + shared)
    sigma = torch.linalg.matrix_norm(matrix_of(layer), ord=2).item()
    monkeypatch.setattr(affine, "_DENSE_SIDE", 0)
    norms = measure(layer)
    assert norms.method == "lanczos"
    assert sigma * (1 - 1e-9) <= norms.sigma_hi <= 1.01 * sigma
    assert norms.sigma_lo == pytest.approx(sigma, rel=1e-8)


def test_the_matrix_is_small_where_the_bounds_are_three_times_too_large():
    """Two by two maps under a kernel whose corners nothing reaches: only the matrix itself knows."""
    corners = torch.zeros(4, 4, 5, 5, dtype=torch.float64)
    corners[:, :, ::4, ::4] = 1
    corners[:, :, 2, 2] = torch.eye(4, dtype=torch.float64)
    layer = make({"c": (4, 4), "k": 5, "side": (2, 2), "padding": 2}, corners)
    assert min(fft_bound(layer), kernel_bound(layer)) > 3
    assert measure(layer).sigma_hi == pytest.approx(1, rel=1e-12)


def test_a_zero_layer_has_zero_norms():
    norms = measure(make(CONVOLUTIONS[0], torch.zeros(8, 3, 3, 3, dtype=torch.float64)))
    assert (norms.sigma_lo, norms.sigma_hi, norms.frobenius, norms.l21, norms.l1) == (0, 0, 0, 0, 0)


def test_a_linear_layer_by_svd():
    model = nn.Linear(6, 4)
    (norms,) = operator_norms(model, (6,))
    weight = model.weight.detach().double()
    assert norms.sigma_lo == norms.sigma_hi == pytest.approx(torch.linalg.matrix_norm(weight, ord=2).item(), rel=1e-12)
    assert norms.l21 == pytest.approx(torch.linalg.vector_norm(weight, dim=1).sum().item(), rel=1e-12)
    assert (norms.width, norms.parameters, norms.method) == (4, 24, "svd")


def test_single_precision_is_refused():
    with pytest.raises(ValueError, match="float64"):
        measure(Affine("l", torch.ones(2, 2), (2,), (2,)))
