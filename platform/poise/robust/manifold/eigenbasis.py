"""Eigenspaces of the images of each class, or of all classes together: where perturbations count as on the manifold."""

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
        directions: (S, r, d), orthonormal rows by falling variance.
        variance: (S, r), of the images along each direction (over n - 1, as in a sample covariance).
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
        """The share of the variance that lies in the eigenspaces, a mean over the sets."""
        return (self.variance.sum(1) / self.total).mean().item()

    def to(self, like: Tensor) -> Eigenbasis:
        """The same basis on the device and in the precision of `like`."""
        return Eigenbasis(*(part.to(like) for part in (self.mean, self.directions, self.variance, self.total)))

    def groups(self, y: Tensor) -> Sequence[tuple[Tensor | slice, int]]:
        """The examples of labels y (N,) that share a set, as (rows, set); waits for the device once."""
        if len(self.mean) == 1:
            return [(slice(None), 0)]
        order, counts = y.argsort(), torch.bincount(y, minlength=len(self.mean))
        if len(counts) > len(self.mean):
            raise ValueError(
                f"the labels go up to {len(counts) - 1} and there are eigenspaces of {len(self.mean)} classes"
            )
        parts = torch.split(order, counts.tolist())
        return [(rows, index) for index, rows in enumerate(parts) if len(rows)]

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """How far each image of x (N, ...) lies from the affine eigenspace, mean and span, of its class: (N,), l2."""
        flat = x.flatten(1)
        far = torch.empty_like(flat[:, 0])
        for rows, index in self.groups(y):
            centred, directions = flat[rows] - self.mean[index], self.directions[index]
            far[rows] = torch.linalg.vector_norm(centred - centred @ directions.T @ directions, dim=1)
        return far


def eigenbasis(x: Tensor, y: Tensor, rank: int, *, shared: bool = False) -> Eigenbasis:
    """Principal component analysis of training images, in float64, by an exact singular value decomposition.

    Args:
        x, y: images (N, ...) in [0, 1] and labels (N,) int64; the classes are 0 to the largest label.
        rank: directions that each eigenspace keeps.
        shared: one eigenspace for all classes.

    Raises:
        ValueError: the images of a class span fewer than `rank` directions, so that the rest would be arbitrary.

    Source: papers/bounds.md, section 5.
    """
    sets = [x] if shared else [x[y == label] for label in range(int(y.max()) + 1)]
    names = ["the training set"] if shared else [f"class {label}" for label in range(len(sets))]
    parts = [_principal(images.flatten(1), rank, name) for images, name in zip(sets, names, strict=True)]
    return Eigenbasis(*(torch.stack(column) for column in zip(*parts, strict=True)))


def _principal(x: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (d,), directions (rank, d), variances (rank,) and total variance of images (n, d)."""
    mean = x.double().mean(0)
    centred = x.double() - mean
    if len(x) > x.shape[1]:  # the triangle has the same singular values and directions, and is smaller
        centred = torch.linalg.qr(centred, mode="r").R
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    noise = singular[:1] * max(x.shape) * torch.finfo(torch.float64).eps
    spanned = min(int((singular > noise).sum()), max(len(x) - 1, 0))
    if rank > spanned:
        raise ValueError(f"{name} has {len(x)} images, which span {spanned} directions: {rank} are too many")
    variance = singular.square() / (len(x) - 1)
    return mean, directions[:rank].clone(), variance[:rank], variance.sum()
