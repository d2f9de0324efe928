"""What a sampler returns: samples held compactly, and responses that end at stop strings."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest

from poise.errors import UserError
from poise.inference.sampler import (
    Decoding,
    Request,
    Sample,
    StopStrings,
)
from poise.inference.transformers_sampler import TransformersSampler
from poise.models.language import open_tokenizer
from poise.spec import SamplerSpec

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2")


def test_a_sample_is_what_it_was_made_of():
    sample = Sample("q", 3, [7, 70_000, 0], [-0.1, -2.0, 0.0], "stop", 5)
    assert (sample.tokens, sample.logprobs, sample.num_tokens) == ((7, 70_000, 0), (-0.1, -2.0, 0.0), 3)
    assert pickle.loads(pickle.dumps(sample)) == sample
    assert {sample} == {Sample("q", 3, np.array([7, 70_000, 0]), (-0.1, -2.0, 0.0), "stop", 5)}
    assert sample != Sample("q", 3, [7, 70_000, 1], [-0.1, -2.0, 0.0], "stop", 5)
    assert [Sample("q", 0, (), (), end, 0).is_truncated for end in ("stop", "stop_string", "length")] == [0, 0, 1]


def test_samples_take_twelve_bytes_per_token_and_little_beside_them():
    tokens, logprobs = np.arange(1000, 1064), np.linspace(-1, 0, 64)
    tracemalloc.start()
    samples = [Sample("q", index, tokens, logprobs, "length", 0) for index in range(2000)]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    per_sample = held / len(samples)
    assert 12 * 64 < per_sample < 12 * 64 + 300
    assert len(pickle.dumps(samples)) / len(samples) < 12 * 64 + 200


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_string_ends_where_the_decoded_text_first_contains_it(family, family_folder):
    """The oracle decodes every beginning of the response anew."""
    tokenizer = open_tokenizer(family_folder(family))
    generator = np.random.default_rng(0)
    ended = 0
    for stop in (("e",), ("at", "q"), ("the cat",), (" c", "xyz")):
        for _ in range(6):
            text = " ".join(generator.choice(["the", "cat", "sat", "on", "of", "France."], size=12))
            prompt = tokenizer("Question: who?").input_ids
            response = tokenizer(text, add_special_tokens=False).input_ids
            before = tokenizer.decode(prompt, skip_special_tokens=True)
            texts = [
                tokenizer.decode([*prompt, *response[:end]], skip_special_tokens=True)[len(before) :]
                for end in range(1, len(response) + 1)
            ]
            expected = next((end for end, said in enumerate(texts) if any(s in said for s in stop)), None)
            strings = StopStrings(tokenizer, prompt, stop)
            found = next((end for end, token in enumerate(response) if strings.completed_by(token)), None)
            assert found == expected
            ended += found is not None
    assert 0 < ended < 24


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_with_stop_strings_is_the_beginning_of_the_one_without(family, family_folder):
    sampler, tokenizer = TransformersSampler(family_folder(family)), open_tokenizer(family_folder(family))
    prompt = tuple(tokenizer("The cat").input_ids)
    asked = [Request("r", prompt, 16, 0)]
    (whole,) = sampler.generate(asked, Decoding(20))
    (short,) = sampler.generate(asked, Decoding(20, stop=("a", "o")))
    for before, after in zip(whole, short, strict=True):
        assert after.tokens == before.tokens[: after.num_tokens]
        assert after.logprobs == pytest.approx(before.logprobs[: after.num_tokens], abs=1e-5)
        if after.finish != "stop_string":
            assert after.tokens == before.tokens
    assert "stop_string" in {sample.finish for sample in short}


def test_progress_counts_the_requests_that_are_answered(family_folder):
    seen = []
    asked = [Request(f"{i}", (5, 6, 7)[: 1 + i % 3], 3, 10 * i) for i in range(6)]
    TransformersSampler(family_folder("llama"), batch_size=4).generate(asked, Decoding(3), seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_the_engine_holds_the_longest_sequence_of_the_run():
    assert SamplerSpec().fit_sequences(700).max_model_len == 701
    assert SamplerSpec(max_model_len=4096).fit_sequences(700).max_model_len == 4096
    with pytest.raises(UserError, match=r"sampler\.max_model_len: 512 tokens are too few .*; set it to 701 or more"):
        SamplerSpec(max_model_len=512).fit_sequences(700)


def test_the_precision_of_the_model_may_be_chosen(family_folder):
    full, half = (TransformersSampler(family_folder("llama"), dtype=dtype) for dtype in ("auto", "bfloat16"))
    exact, rounded = (sampler.score([(5, 6)], [(7, 8, 9)])[0] for sampler in (full, half))
    assert exact != rounded
    assert exact == pytest.approx(rounded, abs=0.1)
