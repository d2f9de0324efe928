"""Perturbations of the latent code of an image; the images that a decoder makes of codes are on the manifold.

A code is (N, m + K): the m latent coordinates of each image, then its label as a one-hot row, which attacks must not
change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from poise.robust.threats import Threat

__all__ = ["DecodedClassifier", "Latent", "elbo_parts"]


@dataclass(frozen=True)
class Latent(Threat):
    """The ball of radius eps around the first `width` coordinates of a code; there is no box. linf or l2.

    Source: arXiv 2210.00430 (its GA-PGD, with the ball that the published code intended).
    """

    width: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "l1":
            raise ValueError("a latent ball is linf or l2, not l1")

    @property
    def in_box(self) -> bool:
        """False: a code is not an image."""
        return False

    def clip_to_box(self, x: Tensor, delta: Tensor) -> Tensor:
        """delta with zeros after the latent coordinates, so that the label does not move; there is no box."""
        return torch.cat([delta[:, : self.width], torch.zeros_like(delta[:, self.width :])], dim=1)

    def steepest_step(
        self, grad: Tensor, size: float | Tensor, *, at: Tensor | None = None, sparsity: int | Tensor = 1
    ) -> Tensor:
        return super().steepest_step(self.clip_to_box(grad, grad), size)


class DecodedClassifier(nn.Module):
    """Maps codes (N, m + K) to the logits of the classifier at the decoded images.

    With a `Latent` threat any attack on it is x' = dec(z + dz, y). At radius 0 it gives the accuracy on
    reconstructions. Report that beside every such attack: errors at radius 0 are due to the decoder, not to an
    adversary.
    """

    def __init__(self, classifier: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.classifier, self.decoder = classifier, decoder

    def forward(self, code: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.decoder(code))
        return logits


def elbo_parts(
    x: Tensor, images: Tensor, mean: Tensor, log_variance: Tensor, log_deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """The two terms of the evidence lower bound per image, (N,) each, in nats; the bound is minus their sum.

    The first is minus the log density of images x (N, ...), whose pixels are normal around `images` (N, ...) with one
    standard deviation exp(log_deviation) for all. The second is KL(q || N(0, I)) of q = N(mean, exp(log_variance)),
    (N, m) each (Kingma and Welling, 2014, appendices B and C.2). Both are in the precision of x.
    """
    images = images.to(x.dtype)
    mean = mean.to(x.dtype)
    log_variance = log_variance.to(x.dtype)
    squares = ((x - images) * (-log_deviation).exp()).square().flatten(1)
    negative_log_density = (squares / 2 + log_deviation + math.log(2 * math.pi) / 2).sum(1)
    kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
    return negative_log_density, kl
