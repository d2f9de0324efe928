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

_STARTS = 3
_MIN_STEPS = 60
_MAX_STEPS = 100
_SETTLED = 1e-8
_EXHAUSTED = 1e-10
_FAILURE = 1e-12
_DENSE_SIDE = 1024
_DENSE_ENTRIES = 2**25
_FREQUENCIES_AT_ONCE = 64
Pair = tuple[int, int]


@dataclass(frozen=True)
class LayerNorms:
    """The norms of one affine layer, its bias left out.

    `sigma_lo` <= spectral norm <= `sigma_hi`; bounds use sigma_hi, and `method` says what certifies it: "svd" of the
    whole matrix, "fft" or "kernel" (see `fft_bound` and `kernel_bound`), or "lanczos", which fails with probability
    1e-12 at most (see `lanczos`). `frobenius`; `l21`: sum of the 2-norms of the rows; `l1`: sum of absolute entries;
    `width`: rows; `parameters`: numbers in the kernel, each counted once however often it is shared.
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
    parameters: int | None = None
    """The numbers that were trained, where the weight has more (an even kernel, made odd)."""

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
        parameters=layer.weight.numel() if layer.parameters is None else layer.parameters,
    )


def _spectral(layer: Affine) -> tuple[float, float, str]:
    if len(layer.inside) == 1:
        sigma = torch.linalg.matrix_norm(layer.weight, ord=2).item()
        return sigma, sigma, "svd"
    rows, columns = math.prod(layer.outside), math.prod(layer.inside)
    if min(rows, columns) <= _DENSE_SIDE and rows * columns <= _DENSE_ENTRIES:
        sigma = _largest_singular_value(dense(layer).unsqueeze(0))
        return sigma, sigma, "svd"
    estimate = lanczos(layer)
    upper = {"fft": fft_bound(layer), "kernel": kernel_bound(layer), "lanczos": estimate.upper}
    method = min(upper, key=lambda name: upper[name])
    return estimate.lower, upper[method], method


def dense(layer: Affine) -> Tensor:
    """The whole matrix of a layer, (rows, columns), from the images of the unit vectors of its smaller side."""
    rows, columns = math.prod(layer.outside), math.prod(layer.inside)
    basis = torch.eye(min(rows, columns), dtype=layer.weight.dtype, device=layer.weight.device)
    if columns <= rows:
        return layer.apply(basis.view(-1, *layer.inside), layer.weight).flatten(1).T
    return layer.transpose(basis.view(-1, *layer.outside)).flatten(1)


@dataclass(frozen=True)
class LanczosNorm:
    """An interval of the spectral norm. `lower` always holds; `upper` fails with a probability of at most 1e-12."""

    lower: float
    upper: float


def lanczos(layer: Affine) -> LanczosNorm:
    """The spectral norm of a convolution: Golub-Kahan bidiagonalisation from three random starts at once.

    Both bases are fully reorthogonalised. After k steps U'A(V, v) is a k x (k + 1) bidiagonal matrix, whose norm is a
    lower estimate. It ends after 100 steps, or, at the earliest after 60, when the estimate has moved by less than 1e-8
    twice in a row for every start (papers/bounds.md, 1.3).

    From a start that is uniform on the sphere of dimension n, the estimate of the largest eigenvalue of A'A is too
    small by a relative error e with probability at most 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)), whatever the spectrum is
    (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992). Solved for e, that is the upper estimate.
    """
    n, m = math.prod(layer.inside), math.prod(layer.outside)
    max_steps = min(_MAX_STEPS, n, m)
    start = torch.randn(_STARTS, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start.to(layer.weight.device)
    v = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    rights = v.new_zeros(_STARTS, max_steps + 1, n)
    lefts = v.new_zeros(_STARTS, max_steps, m)
    rights[:, 0] = v
    bidiagonal = torch.zeros(_STARTS, max_steps, max_steps + 1, dtype=torch.float64)
    best = torch.zeros(_STARTS, dtype=torch.float64)
    settled_for = 0
    steps = 0
    while steps < max_steps and (steps < _MIN_STEPS or settled_for < 2):
        image = layer.apply(v.view(-1, *layer.inside), layer.weight).flatten(1)
        u, alpha = _unit(_orthogonal(image, lefts[:, :steps]), best)
        image = layer.transpose(u.view(-1, *layer.outside)).flatten(1)
        v, beta = _unit(_orthogonal(image, rights[:, : steps + 1]), torch.maximum(best, alpha.cpu()))
        lefts[:, steps] = u
        rights[:, steps + 1] = v
        bidiagonal[:, steps, steps] = alpha.cpu()
        bidiagonal[:, steps, steps + 1] = beta.cpu()
        steps += 1
        estimate = torch.linalg.matrix_norm(bidiagonal[:, :steps, : steps + 1], ord=2)
        settled = bool(((estimate - best).abs() <= _SETTLED * estimate).all())
        settled_for = settled_for + 1 if settled else 0
        best = estimate
    lower = float(best.max())
    return LanczosNorm(lower, lower / math.sqrt(1 - _relative_error(n, steps)))


def _relative_error(n: int, steps: int) -> float:
    """What the largest eigenvalue can be above its best Lanczos estimate, relative to itself."""
    of_one_start = _FAILURE ** (1 / _STARTS)  # the starts are independent, and all have to fail
    error = (math.log(1.648 * math.sqrt(n) / of_one_start) / (2 * steps - 1)) ** 2
    return min(error, 1 - 1e-12)


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


def _unit(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x / ||x|| per row and the lengths. A row that is rounding beside `scale` (starts,) becomes zero.

    That is where the Krylov space of a start is exhausted: what is left has no direction, and is not orthogonal.
    """
    length = torch.linalg.vector_norm(x, dim=1)
    length = torch.where(length > _EXHAUSTED * scale.to(x.device), length, 0.0)
    inverse = torch.where(length > 0, 1 / length, 0.0)
    return x * inverse.unsqueeze(1), length
