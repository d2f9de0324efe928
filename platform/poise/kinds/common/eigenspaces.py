"""The eigenspaces of a data set, for kinds that train or attack within them."""

from __future__ import annotations

from poise.data.images.datasets import ImageSet, to_float
from poise.errors import UserError
from poise.robust.manifold import Eigenbasis, eigenbasis
from poise.robust.spec import Eigenspace

__all__ = ["eigenspaces"]


def eigenspaces(spec: Eigenspace, train: ImageSet) -> Eigenbasis:
    """The leading principal directions of the training images.

    Raises:
        UserError: the images span fewer dimensions than `spec.rank`.
    """
    try:
        return eigenbasis(to_float(train.images), train.labels, spec.rank, shared=spec.shared)
    except ValueError as error:
        raise UserError(f"eigenspace.rank: {error}") from None
