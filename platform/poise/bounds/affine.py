"""Norms of the affine layers of a network as the linear operators that they are, not of their kernels.

A convolution on H x W maps is a sparse (C_out Ho Wo) x (C_in H W) matrix with shared weights; theorems speak of its
norms. None needs the matrix: rows are summed by convolving the squared (or absolute) kernel with ones, and the spectral
norm is enclosed from both sides, up to rounding. Everything is float64. Source: papers/bounds.md, section 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear
from torch.nn.grad import conv2d_input

__all__ = ["Affine", "LayerNorms", "measure"]

_STARTS, _STEPS, _SETTLED = 3, 100, 1e-8
_FREQUENCIES_AT_ONCE = 64
Pair = tuple[int, int]


@dataclass(frozen=True)
class LayerNorms:
    """The norms of one affine layer, its bias left out.

    `sigma_lo` <= spectral norm <= `sigma_hi`; bounds use sigma_hi, and `method` says what certifies it. `frobenius`;
    `l21`: sum of the 2-norms of the rows; `l1`: sum of absolute entries; `width`: rows; `parameters`: numbers in the
    kernel, each counted once however often it is shared.
    """

    name: str
    sigma_lo: float
    sigma_hi: float
    method: str
    frobenius: float
    l21: float
    l1: float
    width: int
    parameters: int


@dataclass(frozen=True)
class Affine:
    """One affine layer at a given input: a Linear (weight (out, in)) or a convolution (weight (out, in/groups, k, k)).

    `inside` and `outside` are the shapes of one example; convolutions pad by zeros.
    """

    name: str
    weight: Tensor
    inside: tuple[int, ...]
    outside: tuple[int, ...]
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer without its bias at x (N, *inside), with another kernel of the same shape."""
        if len(self.inside) == 1:
            return linear(x, weight)
        return conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, y: Tensor) -> Tensor:
        """The transposed convolution at y (N, *outside)."""
        shape = torch.Size((len(y), *self.inside))
        options = (self.stride, self.padding, self.dilation, self.groups)
        x: Tensor = conv2d_input(shape, self.weight, y, *options)  # type: ignore[no-untyped-call]
        return x

    def scaled(self, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Affine:
        """With factors (C_out,) on the output channels or (C_in,) on the input channels."""
        weight, rest = self.weight, [1] * (self.weight.ndim - 2)
        if rows is not None:
            weight = weight * rows.view(-1, 1, *rest)
        if columns is not None:
            grouped = weight.view(self.groups, -1, *weight.shape[1:])
            weight = (grouped * columns.view(self.groups, 1, -1, *rest)).view_as(weight)
        return replace(self, weight=weight)


def measure(layer: Affine) -> LayerNorms:
    """The norms of one layer; its weight is finite and float64 (ValueError otherwise)."""
    if layer.weight.dtype != torch.float64:
        raise ValueError(f"{layer.name}: norms are certified in float64, not in {layer.weight.dtype}")
    if not layer.weight.isfinite().all():
        raise ValueError(f"{layer.name}: a weight is not finite, the network has diverged")
    ones = torch.ones(1, *layer.inside, dtype=torch.float64, device=layer.weight.device)
    squares, sums = layer.apply(ones, layer.weight.square()), layer.apply(ones, layer.weight.abs())
    low, high, method = _spectral(layer)
    return LayerNorms(
        name=layer.name,
        sigma_lo=min(low, high),  # where both are exact, rounding may cross them
        sigma_hi=high,
        method=method,
        frobenius=math.sqrt(squares.sum().item()),
        l21=squares.sqrt().sum().item(),
        l1=sums.sum().item(),
        width=math.prod(layer.outside),
        parameters=layer.weight.numel(),
    )


def _spectral(layer: Affine) -> tuple[float, float, str]:
    if len(layer.inside) == 1:
        sigma = torch.linalg.matrix_norm(layer.weight, ord=2).item()
        return sigma, sigma, "svd"
    upper = {"fft": fft_bound(layer), "kernel": kernel_bound(layer)}
    method = min(upper, key=lambda name: upper[name])
    return lanczos(layer), upper[method], method


def lanczos(layer: Affine) -> float:
    """The spectral norm of a convolution from below: Golub-Kahan bidiagonalisation from three starts at once.

    Both bases are fully reorthogonalised. It ends after 100 steps, or when the estimate has moved by less than 1e-8
    twice in a row for every start. Whatever it returns is a lower estimate (papers/bounds.md, 1.3).
    """
    n, m = math.prod(layer.inside), math.prod(layer.outside)
    steps = min(_STEPS, n, m)
    start = torch.randn(_STARTS, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, _ = _unit(start.to(layer.weight.device))
    rights, lefts = v.new_zeros(_STARTS, steps + 1, n), v.new_zeros(_STARTS, steps, m)
    rights[:, 0] = v
    bidiagonal, best, still = torch.zeros(_STARTS, steps, steps + 1, dtype=torch.float64), torch.zeros(_STARTS), 0
    for k in range(steps):
        u, alpha = _unit(_orthogonal(layer.apply(v.view(-1, *layer.inside), layer.weight).flatten(1), lefts[:, :k]))
        lefts[:, k] = u
        v, beta = _unit(_orthogonal(layer.transpose(u.view(-1, *layer.outside)).flatten(1), rights[:, : k + 1]))
        rights[:, k + 1] = v
        bidiagonal[:, k, k], bidiagonal[:, k, k + 1] = alpha.cpu(), beta.cpu()
        estimate = torch.linalg.matrix_norm(bidiagonal[:, : k + 1, : k + 1], ord=2)
        still = still + 1 if bool(((estimate - best).abs() <= _SETTLED * estimate).all()) else 0
        best = estimate
        if still == 2:
            break
    return float(best.max())


def fft_bound(layer: Affine) -> float:
    """An upper bound on the spectral norm of a convolution: that of the circular one on the padded grid.

    On a grid of (H + 2p) x (W + 2p) no patch wraps around, so the outputs here are some of the circular ones and the
    inputs those with zeros in the padding; a stride drops more outputs. At each frequency the circular convolution is
    a C_out x C_in matrix. On the bare H x W grid it would be no bound (papers/bounds.md, 1.3).
    """
    grid = tuple(side + 2 * pad for side, pad in zip(layer.inside[1:], layer.padding, strict=True))
    kernel = layer.weight.new_zeros(*layer.weight.shape[:2], *grid)
    kernel[:, :, : _reach(layer, 0) : layer.dilation[0], : _reach(layer, 1) : layer.dilation[1]] = layer.weight
    spectrum = torch.fft.rfft2(kernel).flatten(2).movedim(2, 0)  # (frequencies, C_out, C_in / groups)
    return max(
        _largest_singular_value(block)
        for part in spectrum.split(_FREQUENCIES_AT_ONCE)
        for block in part.chunk(layer.groups, dim=1)
    )


def kernel_bound(layer: Affine) -> float:
    """An upper bound: the norm of the kernel as a matrix (C_out, C_in k k), times the root of the most patches that
    share one pixel. For a square kernel without dilation that is ceil(k / stride) times the matrix norm.
    """
    sides = zip(layer.weight.shape[2:], layer.stride, layer.dilation, strict=True)
    shared = math.prod(math.ceil(k * math.gcd(stride, dilation) / stride) for k, stride, dilation in sides)
    blocks = layer.weight.flatten(1).chunk(layer.groups)
    return math.sqrt(shared) * max(float(torch.linalg.matrix_norm(block, ord=2)) for block in blocks)


def _reach(layer: Affine, axis: int) -> int:
    return layer.dilation[axis] * (layer.weight.shape[2 + axis] - 1) + 1


def _largest_singular_value(matrices: Tensor) -> float:
    """Over a stack (F, m, n), from the smaller Gram matrix: for the largest as exact as the SVD, and much faster."""
    gram = matrices.mH @ matrices if matrices.shape[1] > matrices.shape[2] else matrices @ matrices.mH
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram).amax()), 0.0))


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """x (starts, n) without its parts in basis (starts, k, n), twice over because once leaves rounding behind."""
    for _ in range(2):
        parts = torch.bmm(basis, x.unsqueeze(2))
        x = x - torch.bmm(basis.mT, parts).squeeze(2)
    return x


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / ||x|| per row and the lengths; a row of zeros stays one."""
    length = torch.linalg.vector_norm(x, dim=1)
    return x / length.clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(1), length
