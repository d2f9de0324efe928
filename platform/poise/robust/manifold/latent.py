"""Perturbations of an image's code: what a conditional decoder makes of them is on the manifold by construction.

A code is (N, m + K): the m latent coordinates of each image, then its label as a one-hot row that no attack touches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from poise.robust.threats import Threat

__all__ = ["Decoded", "Latent", "elbo_parts"]


@dataclass(frozen=True)
class Latent(Threat):
    """The ball of radius eps around the first `width` coordinates of a code; there is no box. linf or l2.

    Source: papers/bounds.md, section 5 (its GA-PGD, with the ball that the published code meant).
    """

    width: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "l1":
            raise ValueError("a latent ball is linf or l2, not l1")

    @property
    def in_box(self) -> bool:
        """A code is no image."""
        return False

    def confine(self, x: Tensor, delta: Tensor) -> Tensor:
        """Nothing behind the latent coordinates moves."""
        return torch.cat([delta[:, : self.width], torch.zeros_like(delta[:, self.width :])], dim=1)

    def steepest(
        self, grad: Tensor, size: float | Tensor, *, at: Tensor | None = None, sparsity: int | Tensor = 1
    ) -> Tensor:
        return super().steepest(self.confine(grad, grad), size)


class Decoded(nn.Module):
    """Codes (N, m + K) to the logits of the classifier at the images that the decoder makes of them.

    With a `Latent` threat any attack on it is x' = dec(z + dz, y). At radius 0 it is the accuracy on reconstructions,
    which belongs beside every such attack: what it loses, no adversary has taken.
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
    """What the evidence lower bound loses, per image (N,) in nats: it is minus the sum of the two.

    Minus the log density of images x (N, ...), whose pixels are normal around `images` (N, ...) with one standard
    deviation exp(log_deviation) for all, and the divergence KL(q || N(0, I)) of q = N(mean, exp(log_variance)), (N, m)
    each (Kingma and Welling, 2014, appendices B and C.2). In the precision of x.
    """
    images, mean, log_variance = (part.to(x.dtype) for part in (images, mean, log_variance))
    squares = ((x - images) * (-log_deviation).exp()).square().flatten(1)
    density = (squares / 2 + log_deviation + math.log(2 * math.pi) / 2).sum(1)
    kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
    return density, kl
