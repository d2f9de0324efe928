"""A small conditional variational autoencoder of images in [0, 1] (Kingma and Welling, 2014; Sohn et al., 2015)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from poise.models.architectures import Shape
from poise.models.spec import VaeSpec

__all__ = ["ConditionalVae", "build_vae"]


class ConditionalVae(nn.Module):
    """Encoder q(z | x, y) and decoder p(x | z, y), each of two hidden layers, for images (N, *shape) and labels (N,).

    Given z and y, pixels are normal around the output of the decoder, with one learned standard deviation for all
    pixels (Rybkin et al., 2021). A fixed deviation would set an arbitrary weight of the reconstruction against the KL
    term, and where the KL term is too expensive, the codes go unused.

    A code is (N, latent + classes): z, then the label as a one-hot row.
    """

    def __init__(self, spec: VaeSpec, shape: Shape, classes: int) -> None:
        super().__init__()
        self.shape = shape
        self.classes = classes
        self.latent = spec.latent
        pixels = math.prod(shape)
        self.encoder = _perceptron(pixels + classes, spec.width, 2 * spec.latent)
        self.decoder = _perceptron(spec.latent + classes, spec.width, pixels)
        self.log_deviation = nn.Parameter(torch.tensor(math.log(0.2)))

    def forward(self, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images decoded at z = mean + std * noise, mean and log variance of q, log standard deviation of the pixels.

        x: (N, *shape), y: (N,), noise: (N, latent). Returns (N, *shape), (N, latent), (N, latent) and ().
        """
        label = self._one_hot(y, x)  # (N, classes)
        mean, log_variance = self.encoder(torch.cat([x.flatten(1), label], 1)).chunk(2, dim=1)
        z = mean + (log_variance / 2).exp() * noise  # the reparameterization trick
        return self.images(torch.cat([z, label], 1)), mean, log_variance, self.log_deviation

    def code(self, x: Tensor, y: Tensor) -> Tensor:
        """The code (N, latent + classes) of each image: the mean of q, then its label."""
        label = self._one_hot(y, x)
        mean: Tensor = self.encoder(torch.cat([x.flatten(1), label], 1)).chunk(2, dim=1)[0]
        return torch.cat([mean, label], 1)

    @property
    def images(self) -> nn.Module:
        """The module that maps codes to images in [0, 1]."""
        return nn.Sequential(self.decoder, nn.Sigmoid(), nn.Unflatten(1, self.shape))

    def _one_hot(self, y: Tensor, like: Tensor) -> Tensor:
        return nn.functional.one_hot(y, self.classes).to(like.dtype)


def build_vae(spec: VaeSpec, *, shape: Shape, classes: int, seed: int) -> ConditionalVae:
    """The autoencoder of `spec` on the CPU. Its weights depend on `seed` alone; the global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ConditionalVae(spec, shape, classes)


def _perceptron(inside: int, width: int, outside: int) -> nn.Sequential:
    hidden = [nn.Linear(inside, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, outside))
