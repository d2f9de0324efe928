"""Norms of the affine layers of a network as linear operators, not of their kernels.

A convolution on H x W maps is a sparse (C_out Ho Wo) x (C_in H W) matrix with shared weights, and the theorems are
about the norms of that matrix. They are computed without the matrix: rows are summed by convolving the squared (or
absolute) kernel with ones, and the spectral norm is enclosed from both sides, up to rounding. Everything is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear
from torch.nn.grad import conv2d_input

__all__ = ["Affine", "LayerNorms", "measure"]

_STARTS = 3  # random starts of the Lanczos iteration
_MIN_STEPS = 60
_MAX_STEPS = 100
_SETTLED = 1e-8  # relative change of the estimate below which it has converged
_EXHAUSTED = 1e-10  # a relative length below which a vector is rounding
_FAILURE_PROBABILITY = 1e-12
_DENSE_SIDE = 1024  # matrices whose smaller side and entries are at most these are decomposed as a whole
_DENSE_ENTRIES = 2**25
_FREQUENCIES_PER_BLOCK = 64
Pair = tuple[int, int]


@dataclass(frozen=True)
class LayerNorms:
    """The norms of one affine layer, its bias left out.

    `sigma_lo` <= spectral norm <= `sigma_hi`; bounds use sigma_hi, and `method` says what certifies it: "svd" of the
    whole matrix, "fft" or "kernel" (see `fft_bound` and `kernel_bound`), or "lanczos", which fails with probability
    1e-12 at most (see `lanczos`). `frobenius`; `l21`: sum of the 2-norms of the rows; `l1`: sum of absolute entries;
    `width`: number of rows; `parameters`: numbers in the kernel, each counted once, however often it is shared.
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
    """The number of trained parameters, where the weight has more entries (an even kernel, padded to an odd one)."""

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer without its bias at x (N, *inside), with `weight` in place of its kernel."""
        if len(self.inside) == 1:
            return linear(x, weight)
        return conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, y: Tensor) -> Tensor:
        """The transposed operator of a convolution at y (N, *outside): (N, *inside)."""
        shape = torch.Size((len(y), *self.inside))
        options = (self.stride, self.padding, self.dilation, self.groups)
        x: Tensor = conv2d_input(shape, self.weight, y, *options)  # type: ignore[no-untyped-call]
        return x

    def scaled(self, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Affine:
        """The layer with factors (C_out,) on its output channels or (C_in,) on its input channels."""
        weight = self.weight
        spatial = [1] * (weight.ndim - 2)
        if rows is not None:
            weight = weight * rows.view(-1, 1, *spatial)
        if columns is not None:
            grouped = weight.view(self.groups, -1, *weight.shape[1:])  # (groups, out / groups, in / groups, k, k)
            weight = (grouped * columns.view(self.groups, 1, -1, *spatial)).view_as(weight)
        return replace(self, weight=weight)


def measure(layer: Affine) -> LayerNorms:
    """The norms of one layer. Raises ValueError unless its weight is finite and float64."""
    if layer.weight.dtype != torch.float64:
        raise ValueError(f"{layer.name}: norms are certified in float64, not in {layer.weight.dtype}")
    if not layer.weight.isfinite().all():
        raise ValueError(f"{layer.name}: a weight is not finite, the network has diverged")
    ones = torch.ones(1, *layer.inside, dtype=torch.float64, device=layer.weight.device)
    # of each row of the operator, the sum of its squared and of its absolute entries
    squares = layer.apply(ones, layer.weight.square())
    sums = layer.apply(ones, layer.weight.abs())
    low, high, method = _spectral(layer)
    return LayerNorms(
        name=layer.name,
        sigma_lo=min(low, high),  # where both are exact, rounding may swap their order
        sigma_hi=high,
        method=method,
        frobenius=math.sqrt(squares.sum().item()),
        l21=squares.sqrt().sum().item(),
        l1=sums.sum().item(),
        width=math.prod(layer.outside),
        parameters=layer.weight.numel() if layer.parameters is None else layer.parameters,
    )


def _spectral(layer: Affine) -> tuple[float, float, str]:
    """Lower and upper bound on the spectral norm, and the method of the upper bound."""
    if len(layer.inside) == 1:
        sigma = torch.linalg.matrix_norm(layer.weight, ord=2).item()
        return sigma, sigma, "svd"
    rows = math.prod(layer.outside)
    columns = math.prod(layer.inside)
    if min(rows, columns) <= _DENSE_SIDE and rows * columns <= _DENSE_ENTRIES:
        sigma = _largest_singular_value(dense(layer).unsqueeze(0))
        return sigma, sigma, "svd"
    estimate = lanczos(layer)
    upper_bounds = {"fft": fft_bound(layer), "kernel": kernel_bound(layer), "lanczos": estimate.upper}
    method = min(upper_bounds, key=upper_bounds.__getitem__)
    return estimate.lower, upper_bounds[method], method


def dense(layer: Affine) -> Tensor:
    """The whole matrix of a layer, (rows, columns), from the images of the unit vectors on its smaller side."""
    rows = math.prod(layer.outside)
    columns = math.prod(layer.inside)
    basis = torch.eye(min(rows, columns), dtype=layer.weight.dtype, device=layer.weight.device)
    if columns <= rows:
        return layer.apply(basis.view(-1, *layer.inside), layer.weight).flatten(1).T
    return layer.transpose(basis.view(-1, *layer.outside)).flatten(1)


@dataclass(frozen=True)
class LanczosNorm:
    """An interval for the spectral norm. `lower` always holds; `upper` fails with a probability of at most 1e-12."""

    lower: float
    upper: float


def lanczos(layer: Affine) -> LanczosNorm:
    """The spectral norm of a convolution: Golub-Kahan bidiagonalisation from three random starts at once.

    Both bases are fully reorthogonalised. After k steps U'A(V, v) is a k x (k + 1) bidiagonal matrix, whose norm is a
    lower bound. The iteration ends after 100 steps, or, at the earliest after 60, when the estimate has changed by less
    than 1e-8 twice in a row for every start.

    From a start that is uniform on the sphere of dimension n, the estimate of the largest eigenvalue of A'A is too
    small by a relative error e with probability at most 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)), for any spectrum
    (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992). Solved for e, that gives the upper bound.
    """
    n = math.prod(layer.inside)
    m = math.prod(layer.outside)
    max_steps = min(_MAX_STEPS, n, m)
    start = torch.randn(_STARTS, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start.to(layer.weight.device)
    v = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)  # (starts, n)
    right_basis = v.new_zeros(_STARTS, max_steps + 1, n)
    left_basis = v.new_zeros(_STARTS, max_steps, m)
    right_basis[:, 0] = v
    bidiagonal = torch.zeros(_STARTS, max_steps, max_steps + 1, dtype=torch.float64)
    best = torch.zeros(_STARTS, dtype=torch.float64)  # the estimate of each start
    settled_for = 0
    steps = 0
    while steps < max_steps and (steps < _MIN_STEPS or settled_for < 2):
        image = layer.apply(v.view(-1, *layer.inside), layer.weight).flatten(1)
        u, alpha = _unit(_orthogonal(image, left_basis[:, :steps]), best)
        image = layer.transpose(u.view(-1, *layer.outside)).flatten(1)
        v, beta = _unit(_orthogonal(image, right_basis[:, : steps + 1]), torch.maximum(best, alpha.cpu()))
        left_basis[:, steps] = u
        right_basis[:, steps + 1] = v
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
    """The largest relative error of the best Lanczos estimate of the largest eigenvalue, see `lanczos`."""
    # the starts are independent, and all of them have to fail
    failure_of_one_start = _FAILURE_PROBABILITY ** (1 / _STARTS)
    error = (math.log(1.648 * math.sqrt(n) / failure_of_one_start) / (2 * steps - 1)) ** 2
    return min(error, 1 - 1e-12)


def fft_bound(layer: Affine) -> float:
    """An upper bound on the spectral norm of a convolution: the norm of the circular one on the padded grid.

    On a grid of (H + 2p) x (W + 2p) no patch wraps around. So the outputs of the layer are some of the outputs of the
    circular convolution, at inputs that are zero in the padding; a stride drops more outputs. At each frequency the
    circular convolution is a C_out x C_in matrix. On the H x W grid without padding it would not be a bound.
    """
    grid = tuple(side + 2 * pad for side, pad in zip(layer.inside[1:], layer.padding, strict=True))
    kernel = layer.weight.new_zeros(*layer.weight.shape[:2], *grid)  # (C_out, C_in / groups, H + 2p, W + 2p)
    dilation = layer.dilation
    kernel[:, :, : _extent(layer, 0) : dilation[0], : _extent(layer, 1) : dilation[1]] = layer.weight
    spectrum = torch.fft.rfft2(kernel).flatten(2).movedim(2, 0)  # (frequencies, C_out, C_in / groups)
    largest = []
    for part in spectrum.split(_FREQUENCIES_PER_BLOCK):
        for block in part.chunk(layer.groups, dim=1):
            largest.append(_largest_singular_value(block))
    return max(largest)


def kernel_bound(layer: Affine) -> float:
    """An upper bound on the spectral norm of a convolution, from the norm of its kernel as a matrix (C_out, C_in k k).

    The matrix norm is multiplied by the square root of the largest number of patches that share one pixel. For a
    square kernel without dilation that root is ceil(k / stride).
    """
    patches_per_pixel = 1
    for k, stride, dilation in zip(layer.weight.shape[2:], layer.stride, layer.dilation, strict=True):
        patches_per_pixel *= math.ceil(k * math.gcd(stride, dilation) / stride)
    blocks = layer.weight.flatten(1).chunk(layer.groups)
    largest = max(float(torch.linalg.matrix_norm(block, ord=2)) for block in blocks)
    return math.sqrt(patches_per_pixel) * largest


def _extent(layer: Affine, axis: int) -> int:
    """The side of the dilated kernel along one spatial axis."""
    return layer.dilation[axis] * (layer.weight.shape[2 + axis] - 1) + 1


def _largest_singular_value(matrices: Tensor) -> float:
    """The largest singular value in a stack of matrices (F, m, n).

    It comes from the smaller Gram matrix: for the largest value that is as exact as the SVD, and much faster.
    """
    gram = matrices.mH @ matrices if matrices.shape[1] > matrices.shape[2] else matrices @ matrices.mH
    largest = float(torch.linalg.eigvalsh(gram).amax())
    return math.sqrt(max(largest, 0.0))  # rounding can make the eigenvalue of a zero matrix negative


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """x (starts, n) minus its projection onto basis (starts, k, n); done twice, because once leaves rounding errors."""
    for _ in range(2):
        coefficients = torch.bmm(basis, x.unsqueeze(2))  # (starts, k, 1)
        x = x - torch.bmm(basis.mT, coefficients).squeeze(2)
    return x


def _unit(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x / ||x|| per row, and the lengths. A row whose length is rounding relative to `scale` (starts,) becomes zero.

    That happens where the Krylov space of a start is exhausted: the remaining vector is rounding, without a meaningful
    direction, and not orthogonal to the basis.
    """
    length = torch.linalg.vector_norm(x, dim=1)
    length = torch.where(length > _EXHAUSTED * scale.to(x.device), length, 0.0)
    inverse = torch.where(length > 0, 1 / length, 0.0)
    return x * inverse.unsqueeze(1), length
