"""A generated world of facts in which every answer has a known probability.

A question names a relation and an entity, such as `the capital of nerovi ?`. Its answers come from the pool of names of
its relation: one name (`certain`), two to four with fixed probabilities (`ambiguous`), or many with probabilities in
Zipf's proportions (`long_tailed`). The facts are a pure function of the spec; the samples depend on a seed as well.
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

from poise.data.text.examples import Question, TextExample, encode_answers, word_tokenizer
from poise.data.world_spec import WorldSpec
from poise.spec.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Divergence", "Split", "World", "make_world"]

Split = Literal["pretrain", "tune", "validation", "evaluate", "prefer"]
Shares = tuple[float, ...]

_RELATIONS = (
    "capital",
    "founder",
    "river",
    "poet",
    "mountain",
    "mayor",
    "harbour",
    "painter",
    "language",
    "rival",
    "festival",
    "architect",
    "forest",
    "general",
    "currency",
    "patron",
)
"""Relations in turn have a thing and a person as answer: things have names of one word, persons of two."""

_AMBIGUOUS: tuple[Shares, ...] = ((0.6, 0.4), (0.5, 0.3, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.4, 0.3, 0.2, 0.1))
"""The probabilities of the answers of ambiguous questions, used in turn."""

_HELD_OUT = 4
"""Examples of each question in the validation split."""


@dataclass(frozen=True)
class Divergence:
    """A model compared with the true distribution, in nats per answer (EOS included), averaged over questions.

    Attributes:
        cross_entropy: of the model under the true distribution.
        floor: entropy of the true distribution, the least possible cross entropy.
        entropy: of the model's answers, renormalized over the candidates.
        outside: mean probability that the model gives to anything but a candidate (no unit).
    """

    cross_entropy: float
    floor: float
    entropy: float
    outside: float

    @property
    def excess(self) -> float:
        """The KL divergence of the model from the truth, `cross_entropy` - `floor`; 0 for a perfect model."""
        return self.cross_entropy - self.floor


@dataclass(frozen=True)
class World:
    """The questions of a world with their true distributions.

    Attributes:
        facts: all questions.
        candidates: by question id, all names in the pool of its relation.
        words: every word that a question or an answer may hold.
    """

    spec: WorldSpec
    seed: int
    facts: tuple[Question, ...]
    candidates: dict[str, tuple[str, ...]]
    words: tuple[str, ...]

    def questions(self, split: Split) -> tuple[Question, ...]:
        """The questions of a split: ambiguous ones with three answers or more in `prefer`, all in any other split."""
        if split != "prefer":
            return self.facts
        return tuple(fact for fact in self.facts if fact.group == "ambiguous" and len(_truth(fact)) >= 3)

    def texts(self, split: Split) -> list[tuple[str, str]]:
        """Prompt and answer of every example of the split `pretrain`, `tune` or `validation`.

        In `pretrain`, the answers of a question occur in proportion to their probabilities, to within one example. In
        `tune` and `validation` each answer is an independent draw, so that a model that memorizes the few examples of
        `tune` learns other proportions than the true ones.
        """
        number = {"pretrain": self.spec.pretrain, "tune": self.spec.tune, "validation": _HELD_OUT}[split]
        rng = np.random.default_rng(derive_seed(self.seed, "world", split))
        return list(self._draw(number, rng, systematic=split == "pretrain"))

    def _draw(self, number: int, rng: np.random.Generator, *, systematic: bool) -> Iterator[tuple[str, str]]:
        """`number` pairs of prompt and answer for each question, by systematic sampling or independent draws."""
        for fact in self.facts:
            truth = _truth(fact)
            names = list(truth)
            shares = list(truth.values())
            rows = _systematic_sample(shares, number, rng) if systematic else rng.choice(len(names), number, p=shares)
            for row in rows:
                yield fact.prompt, names[row]

    def examples(self, split: Split) -> list[TextExample]:
        """The examples of a split as tokens of `tokenizer()`."""
        return encode_answers(self.texts(split), self.tokenizer())

    def tokenizer(self) -> Tokenizer:
        """One token for each word of this world (see `word_tokenizer`)."""
        return word_tokenizer(self.words)

    def entropy(self, split: Split) -> float:
        """Mean entropy of the true answers to the questions of a split (nats), the least possible loss of a model."""
        truths = [_truth(fact) for fact in self.questions(split)]
        return -math.fsum(p * math.log(p) for truth in truths for p in truth.values()) / len(truths)

    def divergence(self, split: Split, logprobs: Sequence[Tensor]) -> Divergence:
        """Compare a model with the true distribution, exactly and without samples.

        Args:
            logprobs: for each question of the split, log p(answer and EOS) of each of its `candidates` (nats).
        """
        total = torch.zeros(3, dtype=torch.float64)  # cross entropy, entropy, probability outside the candidates
        for fact, scores in zip(self.questions(split), logprobs, strict=True):
            truth = _truth(fact)
            log_p = scores.double().cpu()  # (number of candidates,)
            target = torch.tensor([truth.get(name, 0.0) for name in self.candidates[fact.id]], dtype=torch.float64)
            # a candidate of true probability 0 adds nothing, also where log_p is -inf and the product would be nan
            cross = -(target * log_p)[target > 0].sum()
            conditional = log_p.log_softmax(0).exp()  # given that the answer is a candidate
            entropy = -torch.special.xlogy(conditional, conditional).sum()
            total += torch.stack([cross, entropy, 1 - log_p.exp().sum()])
        cross_entropy, answer_entropy, outside = (total / len(logprobs)).tolist()
        return Divergence(cross_entropy, self.entropy(split), answer_entropy, outside)


def make_world(spec: WorldSpec, seed: int = 0) -> World:
    """The world of `spec.seed`; `seed` draws its samples.

    The accepted answer of a question is drawn from its true distribution, once for the world. Over all questions with
    the same probabilities, each answer is accepted in proportion to its probability, to within one question. Confidence
    equal to the true probability is therefore calibrated up to that rounding, not only in expectation.
    """
    rng = np.random.default_rng(derive_seed(spec.seed, "world"))
    entities, pools, words = _names(spec, rng)
    groups = _groups(spec, rng)
    accepted_rows = _accepted([shares for _, shares in groups], rng)
    pairs = product(pools, entities)  # every relation of every entity
    facts = []
    candidates = {}
    for (relation, entity), (group, shares), accepted in zip(pairs, groups, accepted_rows, strict=True):
        pool = pools[relation]
        names = [pool[row] for row in rng.choice(spec.answers, len(shares), replace=False)]
        fact = Question(
            id=f"{relation}-{entity}",
            prompt=f"the {relation} of {entity} ?",
            answers=(names[accepted],),
            distribution=dict(zip(names, shares, strict=True)),
            group=group,
        )
        facts.append(fact)
        candidates[fact.id] = pool
    return World(spec, seed, tuple(facts), candidates, words)


def _truth(fact: Question) -> dict[str, float]:
    """The true probability of each answer; answers that are missing have probability 0."""
    return dict(fact.distribution or {})


def _groups(spec: WorldSpec, rng: np.random.Generator) -> list[tuple[str, Shares]]:
    """The group of each question and the probabilities of its answers, shuffled over the questions."""
    certain = round(spec.certain.exact * spec.num_questions)
    # the sum is rounded, not the share, so that the groups always add up to the number of questions
    ambiguous = round((spec.certain.exact + spec.ambiguous.exact) * spec.num_questions) - certain
    weights = [1 / rank for rank in range(1, spec.tail + 1)]
    tail = tuple(weight / math.fsum(weights) for weight in weights)
    groups: list[tuple[str, Shares]] = [("certain", (1.0,))] * certain
    groups += [("ambiguous", _AMBIGUOUS[index % len(_AMBIGUOUS)]) for index in range(ambiguous)]
    groups += [("long_tailed", tail)] * (spec.num_questions - len(groups))
    return [groups[row] for row in rng.permutation(len(groups))]


def _accepted(shares: Sequence[Shares], rng: np.random.Generator) -> list[int]:
    """The number of the accepted answer of each question, sampled over all questions with equal probabilities."""
    accepted = np.zeros(len(shares), dtype=np.int64)
    for distinct in dict.fromkeys(shares):
        rows = [row for row, row_shares in enumerate(shares) if row_shares == distinct]
        accepted[rows] = _systematic_sample(distinct, len(rows), rng)
    return [int(index) for index in accepted]


def _systematic_sample(shares: Sequence[float], n: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Indices (n,) into `shares`, shuffled; each occurs n times its share, to within one (systematic sampling).

    Each single draw has exactly the probabilities `shares`.
    """
    points = (np.arange(n) + rng.random()) / n  # evenly spaced in [0, 1) with one common random offset
    return rng.permutation(np.searchsorted(np.cumsum(shares)[:-1], points, side="right"))


def _names(spec: WorldSpec, rng: np.random.Generator) -> tuple[list[str], dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The entities, the pool of answers of each relation, and all words. Other seeds give other names."""
    relations = _RELATIONS[: spec.relations]
    side = 2 * math.isqrt(spec.answers)  # number of first names and of family names; several people share each name
    new_words = _new_words(rng)
    entities = [next(new_words) for _ in range(spec.entities)]
    words = ["the", "of", "?", *relations, *entities]
    pools: dict[str, tuple[str, ...]] = {}
    for index, relation in enumerate(relations):
        if index % 2 == 0:
            pools[relation] = tuple(next(new_words) for _ in range(spec.answers))
            words += pools[relation]
        else:
            first_names = [next(new_words) for _ in range(side)]
            family_names = [next(new_words) for _ in range(side)]
            people = rng.choice(side * side, spec.answers, replace=False)
            pools[relation] = tuple(f"{first_names[row // side]} {family_names[row % side]}" for row in people)
            words += first_names + family_names
    return entities, pools, tuple(words)


def _new_words(rng: np.random.Generator) -> Iterator[str]:
    """Pronounceable words in random order, each once, none of them a word of a question."""
    parts = ["bdfghklmnprstvz", "aeiou"] * 2 + [["", "n", "r", "l", "x"]]
    all_words = ["".join(letters) for letters in product(*parts)]
    return (all_words[row] for row in rng.permutation(len(all_words)) if all_words[row] not in _RELATIONS)
