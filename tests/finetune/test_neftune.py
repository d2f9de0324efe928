"""Noise on embeddings: its bounds for sequences of several lengths, and nothing outside of training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poise.finetune.neftune import EmbeddingNoise


def test_the_noise_of_each_sequence_has_its_own_bound_and_fills_it():
    embedding = nn.Embedding(10, 64)
    noise = EmbeddingNoise(embedding, alpha=5.0)
    ids = torch.zeros(2, 100, dtype=torch.int64)
    mask = torch.ones(2, 100, dtype=torch.int64)
    mask[1, 4:] = 0
    plain = embedding(ids)
    with noise.drawn(torch.Generator().manual_seed(0), mask):
        added = embedding(ids) - plain
    for row, length in enumerate((100, 4)):
        bound = 5 / (length * 64) ** 0.5
        assert added[row].abs().max() <= bound * (1 + 1e-5)
        assert added[row].abs().max() > 0.99 * bound
        assert added[row].mean().abs() < 0.05 * bound
        assert added[row].var().item() == pytest.approx(bound**2 / 3, rel=0.05)


def test_the_noise_is_that_of_the_generator_and_is_gone_afterwards():
    embedding = nn.Embedding(10, 8)
    noise = EmbeddingNoise(embedding, alpha=5.0)
    ids = torch.tensor([[1, 2, 3]])
    plain = embedding(ids)

    def drawn(seed: int):
        with noise.drawn(torch.Generator().manual_seed(seed), torch.ones(1, 3)):
            return embedding(ids)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(drawn(1), plain)
    assert torch.equal(embedding(ids), plain)
    with pytest.raises(KeyError), noise.drawn(torch.Generator(), torch.ones(1, 3)):
        raise KeyError
    assert torch.equal(embedding(ids), plain)


def test_gradients_go_through_it_unchanged():
    embedding = nn.Embedding(10, 8)
    noise = EmbeddingNoise(embedding, alpha=5.0)
    with noise.drawn(torch.Generator().manual_seed(0), torch.ones(1, 3)):
        embedding(torch.tensor([[1, 2, 3]])).sum().backward()
    assert torch.equal(embedding.weight.grad[1:4], torch.ones(3, 8))
