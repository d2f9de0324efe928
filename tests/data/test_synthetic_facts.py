"""A world's truth: exact probabilities, entropies by brute force, samples in their shares, words that come back."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import pytest
import torch
from pydantic import ValidationError

from poise.data.synthetic_facts import make_world
from poise.data.text.examples import encode_completion, encode_prompt
from poise.data.world_spec import WorldSpec
from poise.spec import ExactNumber

SPEC = WorldSpec(seed=3, entities=20, relations=6, answers=9, tail=5, pretrain=30, tune=3)
WORLD = make_world(SPEC, 11)


def shares(counts: Counter[str]) -> dict[str, float]:
    return {name: count / counts.total() for name, count in counts.items()}


def test_a_world_is_a_function_of_its_seed_and_another_seed_has_other_names():
    assert make_world(SPEC, 11) == WORLD
    assert make_world(SPEC, 12).facts == WORLD.facts
    other = make_world(SPEC.model_copy(update={"seed": 4}), 11)
    assert not {fact.prompt for fact in other.facts} & {fact.prompt for fact in WORLD.facts}


def test_probabilities_sum_to_one_and_every_answer_is_a_candidate():
    assert len(WORLD.facts) == len({fact.prompt for fact in WORLD.facts}) == 120
    for fact in WORLD.facts:
        assert math.fsum(fact.distribution.values()) == pytest.approx(1, abs=1e-12)
        assert set(fact.distribution) <= set(WORLD.candidates[fact.id])
        assert len(set(WORLD.candidates[fact.id])) == SPEC.answers


def test_the_groups_have_their_shares_and_forms():
    sizes = defaultdict(Counter)
    for fact in WORLD.facts:
        sizes[fact.group][len(fact.distribution)] += 1
    assert sizes == {"certain": {1: 60}, "ambiguous": {2: 12, 3: 22, 4: 11}, "long_tailed": {5: 15}}
    tail = next(fact for fact in WORLD.facts if fact.group == "long_tailed")
    assert list(tail.distribution.values()) == pytest.approx([60 / 137 / rank for rank in range(1, 6)])
    assert all(len(fact.distribution) >= 3 for fact in WORLD.questions("prefer"))
    assert len(WORLD.questions("prefer")) == 33


@pytest.mark.parametrize("split", ["pretrain", "evaluate", "prefer"])
def test_the_floor_is_the_mean_entropy_by_brute_force(split):
    total = 0.0
    for fact in WORLD.questions(split):
        for p in fact.distribution.values():
            total -= p * math.log2(p) * math.log(2)
    assert WORLD.entropy(split) == pytest.approx(total / len(WORLD.questions(split)), abs=1e-12)


def test_who_tells_the_truth_is_at_the_floor_and_nobody_is_below():
    truth = [
        torch.tensor(
            [fact.distribution.get(name, 0.0) for name in WORLD.candidates[fact.id]], dtype=torch.float64
        ).log()
        for fact in WORLD.facts
    ]
    found = WORLD.divergence("evaluate", truth)
    assert found.excess == pytest.approx(0, abs=1e-12)
    assert found.entropy == pytest.approx(found.floor, abs=1e-12)
    assert found.outside == pytest.approx(0, abs=1e-12)
    noise = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0):
        nudged = [(row + scale * torch.rand(row.shape, generator=noise)).log_softmax(0) for row in truth]
        assert WORLD.divergence("evaluate", nudged).excess > 0


def test_divergence_of_a_uniform_model_that_says_other_things_half_of_the_time():
    model = [torch.full((SPEC.answers,), math.log(0.5 / SPEC.answers))] * len(WORLD.questions("prefer"))
    found = WORLD.divergence("prefer", model)
    assert found.cross_entropy == pytest.approx(math.log(2 * SPEC.answers), abs=1e-6)
    assert found.entropy == pytest.approx(math.log(SPEC.answers), abs=1e-6)
    assert found.outside == pytest.approx(0.5, abs=1e-6)


def test_pretraining_examples_keep_the_shares_to_within_one():
    texts = WORLD.texts("pretrain")
    assert len(texts) == 30 * 120
    counts = defaultdict(Counter)
    for prompt, answer in texts:
        counts[prompt][answer] += 1
    for fact in WORLD.facts:
        for name, p in fact.distribution.items():
            assert abs(counts[fact.prompt][name] - 30 * p) < 1


def test_tuning_examples_are_few_independent_draws_of_the_true_distribution():
    assert len(WORLD.texts("tune")) == 3 * 120
    assert make_world(SPEC, 1).texts("tune") != make_world(SPEC, 2).texts("tune")
    many = make_world(SPEC.model_copy(update={"tune": 4000}))
    fact = next(fact for fact in WORLD.facts if len(fact.distribution) == 4)
    drawn = shares(Counter(answer for prompt, answer in many.texts("tune") if prompt == fact.prompt))
    assert drawn == pytest.approx(dict(fact.distribution), abs=4 * math.sqrt(0.25 / 4000))
    assert any(abs(share - fact.distribution[name]) > 1 / 4000 for name, share in drawn.items())


def test_confidence_equal_to_the_truth_is_calibrated():
    """Over the questions with the same shares, each answer is accepted as often as its share, within one question."""
    kinds = defaultdict(list)
    for fact in WORLD.facts:
        assert len(fact.answers) == 1
        kinds[tuple(fact.distribution.values())].append(list(fact.distribution).index(fact.answers[0]))
    for kind, accepted in kinds.items():
        for index, p in enumerate(kind):
            assert abs(accepted.count(index) - p * len(accepted)) < 1


def test_the_accepted_answer_is_drawn_with_its_probability():
    """Over many worlds the first question accepts its likeliest answer as often as it is true."""
    spec = WorldSpec(entities=2, relations=2, answers=4, certain=ExactNumber(0), ambiguous=ExactNumber(1), tail=2)
    hits, expected, worlds = 0, 0.0, 200
    for seed in range(worlds):
        fact = make_world(spec.model_copy(update={"seed": seed})).facts[0]
        best = max(fact.distribution, key=fact.distribution.get)
        hits += fact.answers == (best,)
        expected += fact.distribution[best]
    assert hits == pytest.approx(expected, abs=4 * math.sqrt(worlds / 4))


def test_every_text_comes_back_from_its_tokens():
    tokenizer = WORLD.tokenizer()
    assert len(tokenizer) == len(WORLD.words) + 3
    answers = {name for names in WORLD.candidates.values() for name in names}
    assert {len(name.split()) for name in answers} == {1, 2}
    for fact in WORLD.facts:
        ids = encode_prompt(tokenizer, fact.prompt)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == fact.prompt
    for name in answers:
        ids = encode_completion(tokenizer, name)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.bos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == name


def test_the_tokenizer_survives_its_files(tmp_path):
    from transformers import AutoTokenizer

    WORLD.tokenizer().save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    fact = WORLD.facts[0]
    assert encode_prompt(read, fact.prompt) == encode_prompt(WORLD.tokenizer(), fact.prompt)
    assert (read.pad_token_id, read.bos_token_id, read.eos_token_id) == (0, 1, 2)
    assert read.decode(encode_prompt(read, fact.prompt), skip_special_tokens=True) == fact.prompt


def test_the_largest_world_has_words_enough():
    world = make_world(WorldSpec(entities=500, relations=16, answers=500, pretrain=1))
    assert len(set(world.words)) == len(world.words)
    assert len(world.facts) == 8000
    assert all(len(set(names)) == 500 for names in world.candidates.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"certain": ExactNumber("3/4"), "ambiguous": ExactNumber("1/2")}, "more than 1"),
        ({"tail": 13}, "longer than the 12 answers"),
    ],
)
def test_impossible_worlds_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        WorldSpec(**changes)


def test_names_of_people_share_their_words():
    people = next(names for names in WORLD.candidates.values() if " " in names[0])
    pairs = itertools.combinations([name.split() for name in people], 2)
    assert any(one[0] == other[0] for one, other in pairs)
