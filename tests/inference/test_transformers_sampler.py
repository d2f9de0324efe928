"""The sampler in this process: against transformers' own generation, a plain forward, and its own contract."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from poise.errors import PoiseError, UserError
from poise.inference.sampler import Decoding, Request
from poise.inference.transformers_sampler import TransformersSampler
from poise.models.model_folder import read_folder

VOCABULARY, CONTEXT, STOP = 11, 64, 3


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    """A random Llama of two layers, sharp enough that its answers differ."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=request.param,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[STOP], pad_token_id=0, bos_token_id=1)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture
def sampler(folder):
    return TransformersSampler(folder)


def model_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def forward_logprobs(model, prompt, tokens):
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    return [logits[len(prompt) + place - 1, token].item() for place, token in enumerate(tokens)]


def requests_of(count, n, length=lambda i: 1 + i % 4):
    return [Request(f"r{i}", (1, *((i + j) % VOCABULARY for j in range(length(i)))), n, 1000 * i) for i in range(count)]


def test_greedy_is_transformers_generate(folder, sampler):
    model = model_of(folder)
    for request, (sample,) in zip(requests_of(6, 1), sampler.generate(requests_of(6, 1), Decoding(20, 0)), strict=True):
        ids = torch.tensor([request.prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert list(sample.tokens) == expected[0, len(request.prompt) :].tolist()
        assert (sample.tokens[-1] == STOP) == (sample.finish == "stop")
        assert STOP not in sample.tokens[:-1]


def test_both_ends_occur(sampler):
    samples = [sample for answer in sampler.generate(requests_of(8, 4), Decoding(8)) for sample in answer]
    assert {sample.finish for sample in samples} == {"stop", "length"}
    assert all(len(sample.tokens) == 8 for sample in samples if sample.finish == "length")


def test_logprobs_are_those_of_the_model_at_temperature_one(folder, sampler):
    model = model_of(folder)
    requests = requests_of(5, 3)
    answers = sampler.generate(requests, Decoding(8, temperature=0.5, top_p=0.8))
    prompts = [request.prompt for request in requests for _ in range(request.n)]
    samples = [sample for answer in answers for sample in answer]
    scores = sampler.score(prompts, [sample.tokens for sample in samples])
    for prompt, sample, score in zip(prompts, samples, scores, strict=True):
        expected = pytest.approx(forward_logprobs(model, prompt, sample.tokens), abs=1e-4)
        assert list(sample.logprobs) == expected
        assert score == expected
    assert sampler.score([(1, 2), (1,)], [(), ()]) == [[], []]


def test_a_sample_is_a_function_of_its_prompt_its_seed_and_its_index(folder):
    requests = requests_of(7, 5)
    whole = TransformersSampler(folder).generate(requests, Decoding(10))
    alone = TransformersSampler(folder, batch_size=2)
    for request, answer in zip(requests, whole, strict=True):
        (again,) = alone.generate([request], Decoding(10))
        assert [sample.tokens for sample in again] == [sample.tokens for sample in answer]
        shifted = Request(request.id, request.prompt, 1, request.seed + 3)
        assert alone.generate([shifted], Decoding(10))[0][0].tokens == answer[3].tokens
    assert [[sample.index for sample in answer] for answer in whole] == [list(range(5))] * 7
    assert len({sample.tokens for answer in whole for sample in answer}) > 20


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6), (1.5, 0.8)])
def test_tokens_come_as_often_as_they_are_probable(folder, sampler, temperature, top_p):
    """Expected counts by brute force; every one of them within 4.5 standard deviations, and nothing off the nucleus."""
    prompt, draws = (1, 5, 7), 4000
    logits = model_of(folder)(torch.tensor([prompt])).logits[0, -1].double() / temperature
    probabilities = dict(enumerate(logits.softmax(-1).tolist()))
    nucleus, mass = [], 0.0
    for token in sorted(probabilities, key=probabilities.get, reverse=True):
        if mass < top_p:
            nucleus.append(token)
            mass += probabilities[token]
    assert (len(nucleus) < VOCABULARY) == (top_p < 1)
    (answer,) = sampler.generate([Request("r", prompt, draws, 0)], Decoding(1, temperature, top_p))
    counts = Counter(sample.tokens[0] for sample in answer)
    assert set(counts) <= set(nucleus)
    for token in nucleus:
        p = probabilities[token] / mass
        assert abs(counts[token] - draws * p) <= 4.5 * (draws * p * (1 - p)) ** 0.5 + 1


def test_new_weights_are_those_of_a_model_that_has_them(folder, sampler):
    model = model_of(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    before = sampler.generate(requests_of(4, 2), Decoding(8))
    sampler.update_weights(model.state_dict(), 3)
    after = sampler.generate(requests_of(4, 2), Decoding(8))
    assert (sampler.version, {sample.version for answer in after for sample in answer}) == (3, {3})
    assert before != after
    for request, answer in zip(requests_of(4, 2), after, strict=True):
        for sample in answer:
            expected = forward_logprobs(model, request.prompt, sample.tokens)
            assert list(sample.logprobs) == pytest.approx(expected, abs=1e-4)
    sampler.update_weights(load_file(folder / "model.safetensors"), 4)  # the names that the folder has
    restored = sampler.generate(requests_of(4, 2), Decoding(8))
    assert [[s.tokens for s in a] for a in restored] == [[s.tokens for s in a] for a in before]


def test_weights_that_are_not_the_models_change_nothing(folder, sampler):
    weights = load_file(folder / "model.safetensors")
    norm = "model.norm.weight"
    wrong = [
        ({name: value for name, value in weights.items() if name != norm}, 1, f"{norm} is missing"),
        ({**weights, "model.extra": torch.ones(3)}, 1, "model.extra is not known"),
        ({**weights, norm: torch.ones(3)}, 1, rf"{norm} is \[3\], not \[64\]"),
        (weights, 0, "version 0 came to a sampler that has version 0 already"),
    ]
    before = sampler.generate(requests_of(2, 1), Decoding(8))
    for sent, version, message in wrong:
        with pytest.raises(PoiseError, match=message):
            sampler.update_weights(sent, version)
    assert sampler.version == 0
    assert sampler.generate(requests_of(2, 1), Decoding(8)) == before


def test_what_cannot_be_asked_is_said(sampler, tmp_path):
    with pytest.raises(UserError, match="has no token"):
        sampler.generate([Request("r", (), 1, 0)], Decoding(4))
    with pytest.raises(UserError, match="3 tokens and 61 more do not fit into the 63"):
        sampler.generate([Request("r", (1, 2, 3), 1, 0)], Decoding(61))
    with pytest.raises(UserError, match=r"no config\.json"):
        read_folder(tmp_path)
