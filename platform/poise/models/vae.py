"""A small conditional variational autoencoder of images in [0, 1] (Kingma and Welling, 2014; Sohn et al., 2015)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from poise.models.plans import Shape
from poise.models.spec import VaeSpec

__all__ = ["ConditionalVae", "build_vae"]


class ConditionalVae(nn.Module):
    """q(z | x, y) and p(x | z, y), each of two hidden layers, for images (N, *shape) and labels (N,).

    Given z and y, pixels are normal around what the decoder says, with one learned deviation for all (Rybkin et al.,
    2021): a fixed one weighs the pixels against the codes arbitrarily, and codes that cost too much go unused.

    A code is (N, latent + classes): z, then the label as a one-hot row.
    """

    def __init__(self, spec: VaeSpec, shape: Shape, classes: int) -> None:
        super().__init__()
        self.shape, self.classes, self.latent = shape, classes, spec.latent
        pixels = math.prod(shape)
        self.encoder = _perceptron(pixels + classes, spec.width, 2 * spec.latent)
        self.decoder = _perceptron(spec.latent + classes, spec.width, pixels)
        self.log_deviation = nn.Parameter(torch.tensor(math.log(0.2)))

    def forward(self, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images at z = mean + std * noise, mean and log variance (N, latent) of q, log deviation of the pixels ()."""
        label = self._one_hot(y, x)
        mean, log_variance = self.encoder(torch.cat([x.flatten(1), label], 1)).chunk(2, dim=1)
        z = mean + (log_variance / 2).exp() * noise
        return self.images(torch.cat([z, label], 1)), mean, log_variance, self.log_deviation

    def code(self, x: Tensor, y: Tensor) -> Tensor:
        """The code of each image: the mean of q, and its label."""
        label = self._one_hot(y, x)
        mean: Tensor = self.encoder(torch.cat([x.flatten(1), label], 1)).chunk(2, dim=1)[0]
        return torch.cat([mean, label], 1)

    @property
    def images(self) -> nn.Module:
        """The module that takes codes to images in [0, 1]."""
        return nn.Sequential(self.decoder, nn.Sigmoid(), nn.Unflatten(1, self.shape))

    def _one_hot(self, y: Tensor, like: Tensor) -> Tensor:
        return nn.functional.one_hot(y, self.classes).to(like.dtype)


def build_vae(spec: VaeSpec, *, shape: Shape, classes: int, seed: int) -> ConditionalVae:
    """The autoencoder of `spec` on the CPU; its weights follow from `seed`, the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ConditionalVae(spec, shape, classes)


def _perceptron(inside: int, width: int, outside: int) -> nn.Sequential:
    hidden = [nn.Linear(inside, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, outside))
