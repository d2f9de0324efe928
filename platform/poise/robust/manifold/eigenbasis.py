"""Eigenspaces of the images of each class, or of all classes; perturbations in them count as on the data manifold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Eigenbasis", "eigenbasis"]


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """The leading principal directions of S sets of images, a set per class or (S = 1) one for all classes.

    Args:
        mean: (S, d).
        directions: (S, r, d), orthonormal rows in order of falling variance.
        variance: (S, r), of the images along each direction (divided by n - 1, as in a sample covariance).
        total: (S,), the variance along all d directions.
    """

    mean: Tensor
    directions: Tensor
    variance: Tensor
    total: Tensor

    @property
    def rank(self) -> int:
        return self.directions.shape[1]

    @property
    def explained(self) -> float:
        """The share of the variance that lies in the eigenspace, averaged over the sets."""
        return (self.variance.sum(1) / self.total).mean().item()

    def to(self, like: Tensor) -> Eigenbasis:
        """The same basis on the device and in the precision of `like`."""
        return Eigenbasis(
            mean=self.mean.to(like),
            directions=self.directions.to(like),
            variance=self.variance.to(like),
            total=self.total.to(like),
        )

    def groups(self, y: Tensor) -> Sequence[tuple[Tensor | slice, int]]:
        """The examples of labels y (N,) grouped by set, as pairs (rows, set); synchronises with the device once."""
        if len(self.mean) == 1:
            return [(slice(None), 0)]
        order = y.argsort()  # examples of one class stand next to each other
        counts = torch.bincount(y, minlength=len(self.mean))
        if len(counts) > len(self.mean):
            raise ValueError(
                f"the labels go up to {len(counts) - 1} and there are eigenspaces of {len(self.mean)} classes"
            )
        parts = torch.split(order, counts.tolist())
        return [(rows, index) for index, rows in enumerate(parts) if len(rows)]

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The l2 distance (N,) of each image of x (N, ...) to the affine eigenspace (mean plus span) of its class."""
        flat = x.flatten(1)  # (N, d)
        distances = torch.empty_like(flat[:, 0])
        for rows, index in self.groups(y):
            centred = flat[rows] - self.mean[index]
            directions = self.directions[index]  # (r, d)
            residual = centred - centred @ directions.T @ directions  # minus its projection
            distances[rows] = torch.linalg.vector_norm(residual, dim=1)
        return distances


def eigenbasis(x: Tensor, y: Tensor, rank: int, *, shared: bool = False) -> Eigenbasis:
    """Principal component analysis of training images, in float64, by an exact singular value decomposition.

    Args:
        x, y: images (N, ...) in [0, 1] and labels (N,) int64; the classes are 0 to the largest label.
        rank: number of directions of each eigenspace.
        shared: one eigenspace for all classes.

    Raises:
        ValueError: the images of a class span fewer than `rank` directions, so that the rest would be arbitrary.

    Source: arXiv 2210.00430.
    """
    if shared:
        sets = {"the training set": x}
    else:
        labels = range(int(y.max()) + 1)
        sets = {f"class {label}": x[y == label] for label in labels}
    parts = [_principal(images.flatten(1), rank, name) for name, images in sets.items()]
    means, directions, variances, totals = zip(*parts, strict=True)
    return Eigenbasis(torch.stack(means), torch.stack(directions), torch.stack(variances), torch.stack(totals))


def _principal(x: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (d,), directions (rank, d), variances (rank,) and total variance of images (n, d)."""
    mean = x.double().mean(0)
    centred = x.double() - mean
    if len(x) > x.shape[1]:  # R of the QR decomposition is smaller, with the same singular values and directions
        centred = torch.linalg.qr(centred, mode="r").R
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    rounding = singular[:1] * max(x.shape) * torch.finfo(torch.float64).eps
    # n centred images span at most n - 1 directions
    spanned = min(int((singular > rounding).sum()), max(len(x) - 1, 0))
    if rank > spanned:
        raise ValueError(f"{name} has {len(x)} images, which span {spanned} directions: {rank} are too many")
    # squared singular values of the centred images are the sums of squares along each direction
    variance = singular.square() / (len(x) - 1)
    return mean, directions[:rank].clone(), variance[:rank], variance.sum()
