"""A language model small enough to know all that it can say: 3 words, responses of 1 to 3 of them, an exact policy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from poise.align.selfplay import PolicyBatch, SelfPlayMethod
from poise.align.selfplay.policy_loss import Responses, collate, response_logits

EOS, PROMPT = 2, (2,)


class Toy(nn.Module):
    """A table of logits, a row per unfinished prefix; `responses` is all that it can say in `longest` tokens."""

    def __init__(self, logits: Tensor, longest: int) -> None:
        super().__init__()
        self.table = nn.Parameter(logits.clone())
        unfinished = [p for n in range(longest) for p in itertools.product((0, 1), repeat=n)]
        self.responses = [(*p, t) for p in unfinished for t in (0, 1, EOS) if t == EOS or len(p) + 1 == longest]
        self.batch = collate([PROMPT] * len(self.responses), self.responses, torch.device("cpu"))

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        state, rows = torch.zeros(len(ids), dtype=torch.int64), []
        for position in range(ids.shape[1]):
            if position:
                state = 2 * state + 1 + ids[:, position].clamp(max=1)
            rows.append(self.table[state.clamp(max=len(self.table) - 1)])
        return torch.stack(rows, 1)

    def policy(self) -> np.ndarray:
        """The exact distribution over `responses`, by the brute force of the definition."""
        with torch.no_grad():
            rows = response_logits(self, self.batch).double().log_softmax(-1)
        tokens = [token for response in self.responses for token in response]
        each = iter(rows[range(len(tokens)), tokens].tolist())
        return np.exp([sum(next(each) for _ in response) for response in self.responses])


def toy_of(*, policy: np.ndarray | None = None, seed: int = 0) -> Toy:
    """One token from `policy`, or random responses of up to three."""
    if policy is not None:
        return Toy(torch.tensor(policy, dtype=torch.float32).log()[None], longest=1)
    return Toy(torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)), longest=3)


def spread(policy: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """`count` samples (indices) by systematic resampling: unbiased, each as often as its probability up to one."""
    points = (np.arange(count) + draw.uniform()) / count
    return np.minimum(np.searchsorted(policy.cumsum(), points), len(policy) - 1)


class SelfPlay:
    """The iteration of the platform on a toy: sample, ask the matrix, take inner steps, replace the magnet."""

    samples = 512

    def __init__(self, toy: Toy, game: np.ndarray, *, lr: float, seed: int = 0) -> None:
        self.toy, self.game, self.draw = toy, torch.tensor(game, dtype=torch.float32), np.random.default_rng(seed)
        self.optimizer = torch.optim.Adam(toy.parameters(), lr=lr)
        self.reference = toy.policy()
        self.magnet = self._logits(self._all())

    def iterate(self, method: SelfPlayMethod, opponents: np.ndarray | None, inner_steps: int) -> None:
        """One iteration; without `opponents` the rollouts are compared with each other."""
        mine = spread(self.toy.policy(), self.samples, self.draw)
        theirs = mine if opponents is None else spread(opponents, self.samples, self.draw)
        worth = method.advantage(self.game[mine][:, theirs][None])
        batch = self._of(mine)
        previous = self._logits(batch)
        for _ in range(inner_steps):
            logits = response_logits(self.toy, batch)
            output = method.loss(PolicyBatch(batch, worth, logits, previous, self._rows(self.magnet, mine)))
            self.optimizer.zero_grad()
            output.loss.mean().backward()
            self.optimizer.step()

    def replace_magnet(self) -> None:
        self.magnet = self._logits(self._all())

    def _all(self) -> Responses:
        return self.toy.batch

    def _of(self, chosen: np.ndarray) -> Responses:
        return Responses(*(part[chosen] for part in self.toy.batch))

    def _logits(self, batch: Responses) -> Tensor:
        return response_logits(self.toy, batch).detach()

    def _rows(self, logits: Tensor, chosen: np.ndarray) -> Tensor:
        """Logits (M, V) of all responses, as those of the chosen ones."""
        full = torch.zeros(*self.toy.batch.mask.shape, 3)
        full[self.toy.batch.mask] = logits
        return full[chosen][self.toy.batch.mask[chosen]]


@pytest.fixture
def make_toy():
    return toy_of


@pytest.fixture
def self_play():
    return SelfPlay
