"""Attacks on the data manifold: within the eigenspaces of the classes, and through a conditional decoder."""

from poise.robust.manifold.eigenbasis import Eigenbasis, eigenbasis
from poise.robust.manifold.latent import DecodedClassifier, Latent, elbo_parts
from poise.robust.manifold.subspace import EigenspaceThreat, SubspaceResidual, subspace_residual

__all__ = [
    "DecodedClassifier",
    "Eigenbasis",
    "EigenspaceThreat",
    "Latent",
    "SubspaceResidual",
    "eigenbasis",
    "elbo_parts",
    "subspace_residual",
]
