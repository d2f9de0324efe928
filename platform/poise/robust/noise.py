"""Random numbers per example: the draws of an example depend on its key alone, not on the batch that it is in.

A stream is a hash, not a state: the same call twice gives the same numbers, and a label (`fold_in`) names another
stream. So an attack may drop examples, or be split over batches or workers, and every example still gets the same
noise. Nothing synchronises with the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Noise", "Source", "as_noise"]

# the constants of SplitMix64, as signed 64-bit integers
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


class Noise:
    """A stream of random numbers for each of N examples, from their keys (N,) int64."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    @classmethod
    def drawn(cls, generator: torch.Generator, n: int, device: torch.device | None = None) -> Noise:
        """Streams for the n examples of a batch, whose keys come from `generator`."""
        keys = torch.randint(-(2**62), 2**62, (n,), generator=generator, device=generator.device)
        return cls(keys if device is None else keys.to(device))

    @classmethod
    def of(cls, seed: int, name: str, indices: Sequence[int] | Tensor, device: torch.device | None = None) -> Noise:
        """Streams for the examples of a data set at these indices, in the experiment `name` under `seed`."""
        keys = torch.as_tensor(indices, dtype=torch.int64, device=device)
        return cls(_hash(keys)).fold_in(seed).fold_in(zlib.crc32(name.encode()))

    def fold_in(self, label: int) -> Noise:
        """The streams that belong to `label`: a restart, a step, a target."""
        return Noise(_hash(self.keys ^ _hash(torch.full_like(self.keys, label % 2**62))))

    def select(self, rows: Tensor) -> Noise:
        """The streams of some of the examples."""
        return Noise(self.keys[rows])

    def to(self, device: torch.device) -> Noise:
        """The same streams on another device."""
        return Noise(self.keys.to(device))

    def uniform(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, width) numbers, uniform in [0, 1)."""
        # as many bits as the mantissa holds, so that no number rounds up to 1
        bits = 53 if dtype == torch.float64 else 24
        numbers = _shift(self._words(width), 64 - bits).to(torch.float64) * 2.0**-bits
        return numbers.to(dtype)

    def normal(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, width) standard normal numbers."""
        eps = torch.finfo(dtype).eps  # the quantile function is infinite at 0 and 1
        normal: Tensor = torch.special.ndtri(self.uniform(width, dtype).clamp(eps, 1 - eps))
        return normal

    def integers(self, low: int | Tensor, high: int | Tensor, width: int) -> Tensor:
        """(N, width) integers, uniform in [low, high). The bounds may be (N, 1)."""
        return low + (self.uniform(width, torch.float64) * (high - low)).long()

    def _words(self, width: int) -> Tensor:
        """(N, width) hashes: 64 random bits each, as int64."""
        counter = torch.arange(1, width + 1, device=self.keys.device) * _GAMMA
        return _hash(self.keys.unsqueeze(1) + counter)


Source = Noise | torch.Generator | None
"""Where the noise of an attack comes from: streams per example, or a generator that draws their keys. With None, every
call gets the same noise."""


def as_noise(source: Source, x: Tensor) -> Noise:
    """The streams of a batch x (N, ...), on its device."""
    if isinstance(source, Noise):
        return source.to(x.device)
    generator = torch.Generator().manual_seed(0) if source is None else source
    return Noise.drawn(generator, len(x), x.device)


def _hash(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), in arithmetic modulo 2^64."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """z shifted right by `by` bits as an unsigned number; `>>` alone would repeat the sign bit."""
    return (z >> by) & ((1 << (64 - by)) - 1)
