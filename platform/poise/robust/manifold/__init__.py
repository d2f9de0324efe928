"""Attacks on the data manifold: within the eigenspaces of the classes, and through a conditional decoder."""

from poise.robust.manifold.eigenbasis import Eigenbasis, eigenbasis
from poise.robust.manifold.latent import Decoded, Latent, elbo_parts
from poise.robust.manifold.subspace import Departure, Within, departure

__all__ = ["Decoded", "Departure", "Eigenbasis", "Latent", "Within", "departure", "eigenbasis", "elbo_parts"]
