"""A generated world of facts whose every answer has a known probability.

A question is a relation and an entity in words, such as `the capital of nerovi ?`. Its answers are names of the
relation's own pool: one of them (`certain`), two to four with given shares (`ambiguous`), or many in Zipf's proportions
(`long_tailed`). The facts are a pure function of the spec, and the samples of the spec and a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poise.data.examples import Question, TextExample, encode_answers, word_tokenizer
from poise.data.spec import WorldSpec
from poise.spec.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Divergence", "Split", "World", "make_world"]

Split = Literal["pretrain", "tune", "validation", "evaluate", "prefer"]
Shares = tuple[float, ...]

_RELATIONS = (
    "capital", "founder", "river", "poet", "mountain", "mayor", "harbour", "painter",
    "language", "rival", "festival", "architect", "forest", "general", "currency", "patron",
)  # fmt: skip
"""Places and things have names of one word; every second relation asks for a person, who has two."""

_AMBIGUOUS: tuple[Shares, ...] = ((0.6, 0.4), (0.5, 0.3, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.4, 0.3, 0.2, 0.1))
_HELD_OUT = 4


@dataclass(frozen=True)
class Divergence:
    """A model against the truth, in nats per answer (EOS included), averaged over questions.

    `excess` = `cross_entropy` - `floor` is the KL divergence of the model from the truth and 0 at best. `entropy` is
    that of the model's own answers among the candidates, `outside` the mean probability of anything else.
    """

    cross_entropy: float
    floor: float
    entropy: float
    outside: float

    @property
    def excess(self) -> float:
        """How far above the floor the model is."""
        return self.cross_entropy - self.floor


@dataclass(frozen=True)
class World:
    """Questions with their truth, `candidates` (every name that answers the relation, by question id) and all words."""

    spec: WorldSpec
    seed: int
    facts: tuple[Question, ...]
    candidates: dict[str, tuple[str, ...]]
    words: tuple[str, ...]

    def questions(self, split: Split) -> tuple[Question, ...]:
        """Every question, in every split alike; in `prefer` the ambiguous ones with three answers or more."""
        if split != "prefer":
            return self.facts
        return tuple(fact for fact in self.facts if fact.group == "ambiguous" and len(_truth(fact)) >= 3)

    def texts(self, split: Split) -> list[tuple[str, str]]:
        """Prompt and answer of every example of a split that is trained or validated on.

        In `pretrain` the answers of a question come in their true shares, to within one example; in `tune` and
        `validation` each is an independent draw, so that the few of `tune` mislead who learns them by heart.
        """
        number = {"pretrain": self.spec.pretrain, "tune": self.spec.tune, "validation": _HELD_OUT}[split]
        rng = np.random.default_rng(derive_seed(self.seed, "world", split))
        return list(self._drawn(number, rng, in_shares=split == "pretrain"))

    def _drawn(self, number: int, rng: np.random.Generator, *, in_shares: bool) -> Iterator[tuple[str, str]]:
        for fact in self.facts:
            names, shares = list(_truth(fact)), list(_truth(fact).values())
            rows = _in_shares(shares, number, rng) if in_shares else rng.choice(len(names), number, p=shares)
            for row in rows:
                yield fact.prompt, names[row]

    def examples(self, split: Split) -> list[TextExample]:
        """The examples of a split in tokens of `tokenizer()`."""
        return encode_answers(self.texts(split), self.tokenizer())

    def tokenizer(self) -> Tokenizer:
        """One token for each word of this world (see `word_tokenizer`)."""
        return word_tokenizer(self.words)

    def entropy(self, split: Split) -> float:
        """Mean over the questions of the entropy of the true answer (nats): the loss that no model can beat."""
        truths = [_truth(fact) for fact in self.questions(split)]
        return -math.fsum(p * math.log(p) for truth in truths for p in truth.values()) / len(truths)

    def divergence(self, split: Split, logprobs: Sequence[Tensor]) -> Divergence:
        """Measure a model exactly, by the distribution itself and not by samples.

        Args:
            logprobs: for each question of the split, log p(answer and EOS) of each of its `candidates` (nats).
        """
        total = torch.zeros(3, dtype=torch.float64)
        for fact, scores in zip(self.questions(split), logprobs, strict=True):
            own, truth = scores.double().cpu(), _truth(fact)
            target = torch.tensor([truth.get(name, 0.0) for name in self.candidates[fact.id]], dtype=torch.float64)
            mass, among = own.exp().sum(), own.log_softmax(0)
            # a candidate that never answers adds nothing, though the model may give it probability 0
            cross = -(target * own)[target > 0].sum()
            entropy = -torch.special.xlogy(among.exp(), among.exp()).sum()
            total += torch.stack([cross, entropy, 1 - mass])
        cross_entropy, answers, outside = (total / len(logprobs)).tolist()
        return Divergence(cross_entropy, self.entropy(split), answers, outside)


def make_world(spec: WorldSpec, seed: int = 0) -> World:
    """The world of `spec.seed`, whose samples `seed` draws.

    The accepted answer of a question is drawn from its true distribution, once for the world: over all questions with
    the same shares, each answer is accepted as often as its share says, to within one question. Confidence equal to
    the true probability is therefore calibrated up to that rounding, not only in expectation.
    """
    rng = np.random.default_rng(derive_seed(spec.seed, "world"))
    entities, pools, words = _names(spec, rng)
    groups = _groups(spec, rng)
    accepted = _accepted([shares for _, shares in groups], rng)
    facts, candidates = [], {}
    for (relation, entity), (group, shares), right in zip(product(pools, entities), groups, accepted, strict=True):
        rows = rng.choice(spec.answers, len(shares), replace=False)
        names = [pools[relation][row] for row in rows]
        fact = Question(
            f"{relation}-{entity}",
            f"the {relation} of {entity} ?",
            (names[right],),
            dict(zip(names, shares, strict=True)),
            group,
        )
        facts.append(fact)
        candidates[fact.id] = pools[relation]
    return World(spec, seed, tuple(facts), candidates, words)


def _truth(fact: Question) -> dict[str, float]:
    return dict(fact.distribution or {})


def _groups(spec: WorldSpec, rng: np.random.Generator) -> list[tuple[str, Shares]]:
    """A group and the shares of its answers for each question, shuffled over the questions."""
    certain = round(spec.certain.exact * spec.num_questions)
    ambiguous = round((spec.certain.exact + spec.ambiguous.exact) * spec.num_questions) - certain
    weights = [1 / rank for rank in range(1, spec.tail + 1)]
    tail = tuple(weight / math.fsum(weights) for weight in weights)
    groups: list[tuple[str, Shares]] = [("certain", (1.0,))] * certain
    groups += [("ambiguous", _AMBIGUOUS[index % len(_AMBIGUOUS)]) for index in range(ambiguous)]
    groups += [("long_tailed", tail)] * (spec.num_questions - len(groups))
    return [groups[row] for row in rng.permutation(len(groups))]


def _accepted(shares: Sequence[Shares], rng: np.random.Generator) -> list[int]:
    """Which answer of each question is accepted, drawn for all questions of equal shares together."""
    accepted = np.zeros(len(shares), dtype=np.int64)
    for kind in dict.fromkeys(shares):
        rows = [row for row, own in enumerate(shares) if own == kind]
        accepted[rows] = _in_shares(kind, len(rows), rng)
    return [int(index) for index in accepted]


def _in_shares(shares: Sequence[float], n: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """n draws, shuffled, with exact marginals and counts within one of n times the shares (systematic sampling)."""
    points = (np.arange(n) + rng.random()) / n
    return rng.permutation(np.searchsorted(np.cumsum(shares)[:-1], points, side="right"))


def _names(spec: WorldSpec, rng: np.random.Generator) -> tuple[list[str], dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Entities, the pool of answers of each relation, and all words. Other seeds give other names."""
    relations = _RELATIONS[: spec.relations]
    side = 2 * math.isqrt(spec.answers)  # given names, and as many family names, so that people share them
    fresh = _fresh_words(rng)
    entities = [next(fresh) for _ in range(spec.entities)]
    words = ["the", "of", "?", *relations, *entities]
    pools: dict[str, tuple[str, ...]] = {}
    for index, relation in enumerate(relations):
        if index % 2 == 0:
            pools[relation] = tuple(next(fresh) for _ in range(spec.answers))
            words += pools[relation]
        else:
            given, family = ([next(fresh) for _ in range(side)] for _ in range(2))
            people = rng.choice(side * side, spec.answers, replace=False)
            pools[relation] = tuple(f"{given[row // side]} {family[row % side]}" for row in people)
            words += given + family
    return entities, pools, tuple(words)


def _fresh_words(rng: np.random.Generator) -> Iterator[str]:
    """Pronounceable words in random order, each once, none of them a word of a question."""
    parts = ["bdfghklmnprstvz", "aeiou"] * 2 + [["", "n", "r", "l", "x"]]
    every = ["".join(letters) for letters in product(*parts)]
    return (every[row] for row in rng.permutation(len(every)) if every[row] not in _RELATIONS)
