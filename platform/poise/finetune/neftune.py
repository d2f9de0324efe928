"""NEFTune: noise on the embeddings of the prompt and the completion, in training only (Jain et al., 2310.05914).

    e <- e + u,   u uniform in [-alpha / sqrt(L d), alpha / sqrt(L d)]

L is the number of tokens of each sequence, without padding, and d the width of an embedding. Public implementations
take the length of the padded batch for L, which makes the noise of a short sequence depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EmbeddingNoise"]


class EmbeddingNoise:
    """Adds noise to the output (B, T, d) of `embedding` while `drawn` is active; otherwise the module is as it was."""

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self._alpha = alpha
        self._generator: torch.Generator | None = None
        self._lengths: Tensor | None = None
        embedding.register_forward_hook(self._add)

    @contextmanager
    def drawn(self, generator: torch.Generator, mask: Tensor) -> Iterator[None]:
        """Add noise from `generator`, for sequences whose tokens have 1 in `mask` (B, T), while the block runs."""
        self._generator = generator
        self._lengths = mask.sum(1).clamp(min=1)
        try:
            yield
        finally:
            self._generator = self._lengths = None

    def _add(self, module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor | None:
        if self._generator is None or self._lengths is None:
            return None
        largest = self._alpha / (self._lengths * embeddings.shape[-1]).sqrt()  # (B,)
        uniform = torch.rand(embeddings.shape, generator=self._generator, device=embeddings.device, dtype=torch.float32)
        noise = (2 * uniform - 1) * largest[:, None, None]  # (B, T, d)
        return embeddings + noise.to(embeddings.dtype)
