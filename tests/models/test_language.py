"""Language models: pure in the seed, exact through a folder, a run and S3, scored as a slow loop would, trainable."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from poise.data.synthetic_facts import World, make_world
from poise.data.text.batches import TextBatches
from poise.data.text.examples import encode_completion, encode_prompt
from poise.data.world_spec import WorldSpec
from poise.errors import UserError
from poise.models.language import (
    MODEL_FOLDER,
    answer_logprobs,
    export,
    fetch_folder,
    new_llama,
    open_folder,
    open_language_model,
)
from poise.models.spec import LanguageModelSpec
from poise.store.runs import open_run
from poise.store.storage import open_storage

WORLD = make_world(WorldSpec(entities=4, relations=2, answers=4, tail=3))
TOKENIZER = WORLD.tokenizer()
TINY = LanguageModelSpec(name="llama", hidden=32, layers=1, heads=1, context=32)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return new_llama(TINY, TOKENIZER, seed=1)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_new_model_is_a_function_of_its_seed_alone(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, _ = open_language_model(TINY, "unused", 1, TOKENIZER)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(model, again)
    assert not same(model, new_llama(TINY, TOKENIZER, seed=2))
    assert again.training


def test_no_two_names_share_a_tensor_and_the_size_is_known(model):
    state = model.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    attention, feed_forward, norm = 4 * 32**2, 3 * 32 * 128, 32
    layer = attention + feed_forward + 2 * norm
    assert sum(p.numel() for p in model.parameters()) == 2 * len(TOKENIZER) * 32 + layer + norm
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_export_opens_with_the_same_bits_from_a_folder(model, tmp_path):
    export(model, TOKENIZER, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    } <= names  # fmt: skip
    read, tokenizer = open_folder(tmp_path / "model")
    assert same(model, read)
    assert read.training
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert read.generation_config.eos_token_id == TOKENIZER.eos_token_id
    spec = LanguageModelSpec(folder=str(tmp_path / "model"))
    assert fetch_folder(spec, "unused", tmp_path / "into") == tmp_path / "model"
    assert same(open_language_model(spec, "unused", 0)[0], model)


@pytest.mark.parametrize("store_kind", ["folder", "s3"])
def test_the_model_of_a_run_is_opened(model, tmp_path, store_kind, request):
    store = request.getfixturevalue("s3_store") if store_kind == "s3" else str(tmp_path / "runs")
    export(model, TOKENIZER, tmp_path / "model")
    run = open_run(store, "first")
    run.claim_spec("kind: finetune.sft", "0")
    spec = LanguageModelSpec(run="first")
    with pytest.raises(UserError, match="run 'first' has left no model"):
        open_language_model(spec, store, 0)
    for path in (tmp_path / "model").iterdir():
        run.write(f"{MODEL_FOLDER}/{path.name}", path.read_bytes())
    assert same(open_language_model(spec, store, 0)[0], model)
    folder = LanguageModelSpec(folder=open_storage(store).url + f"/first/{MODEL_FOLDER}")
    assert same(open_language_model(folder, "unused", 0)[0], model)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        fetch_folder(LanguageModelSpec(folder=str(tmp_path)), "unused", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say which model it is"):
        open_language_model(LanguageModelSpec(folder=str(tmp_path)), "unused", 0)
    with pytest.raises(UserError, match="there is no run 'lost'"):
        open_language_model(LanguageModelSpec(run="lost"), str(tmp_path), 0)
    with pytest.raises(UserError, match="in no folder"):
        fetch_folder(TINY, "unused", tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "is one of run"),
        ({"run": "a", "folder": "b"}, "is one of run"),
        ({"run": "a", "layers": 3}, "only a new model has a size"),
        ({"name": "llama", "hidden": 96, "heads": 2}, "96 is not 2 heads of 32, 64 or 128"),
    ],
)
def test_specs_that_name_no_one_model_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        LanguageModelSpec(**values)


def test_a_written_out_spec_reads_back():
    for spec in (TINY, LanguageModelSpec(run="a"), LanguageModelSpec(folder="s3://b/c")):
        assert LanguageModelSpec(**spec.model_dump()) == spec


def test_scores_are_those_of_one_sequence_at_a_time(model):
    prompts = [encode_prompt(TOKENIZER, fact.prompt) for fact in WORLD.facts[:3]]
    answers = [[(5, 2), (6, 7, 2), (2,)], [(8, 8, 8, 2)], [(9, 2), (10, 2)]]
    for batch_size in (1, 4, 100):
        found = answer_logprobs(model, prompts, answers, batch_size)
        for prompt, given, scores in zip(prompts, answers, found, strict=True):
            for answer, score in zip(given, scores, strict=True):
                with torch.no_grad():
                    logp = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
                slow = sum(logp[len(prompt) - 1 + place, token] for place, token in enumerate(answer))
                assert float(score) == pytest.approx(float(slow), abs=2e-5)
    assert model.training


def test_the_probabilities_of_all_answers_of_two_tokens_sum_to_those_that_do_not_stop(model):
    prompt, vocabulary = (1, 3), range(len(TOKENIZER))
    every = [[*itertools.product(vocabulary, vocabulary)]]
    assert float(answer_logprobs(model, [prompt], every)[0].double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_the_real_llama_with_tied_weights_goes_through_a_folder(shared_data, tmp_path):
    folder = shared_data / "lm" / "stories260K-hf-hd32"
    real, tokenizer = open_folder(folder)
    export(real, tokenizer, tmp_path / "copy")
    assert same(open_folder(tmp_path / "copy")[0], real)


def _step(model: nn.Module, batches: TextBatches, optimizer: torch.optim.Optimizer, index: int) -> None:
    batch = batches.batch(index)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _pretrained(world: World, steps: int, seed: int) -> nn.Module:
    model = new_llama(LanguageModelSpec(name="llama"), world.tokenizer(), seed)
    batches = TextBatches(world.examples("pretrain"), 64, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    warm_cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for index in range(steps):
        _step(model, batches, optimizer, index)
        warm_cosine.step()
    return model


@pytest.mark.slow
def test_the_default_model_learns_the_default_world_to_its_floor():
    """The excess over the entropy floor is exact: no sample is drawn to measure it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        world = make_world(WorldSpec())
        model, tokenizer = _pretrained(world, 640, seed=0), world.tokenizer()
        prompts = [encode_prompt(tokenizer, fact.prompt) for fact in world.facts]
        answers = [[encode_completion(tokenizer, name) for name in world.candidates[fact.id]] for fact in world.facts]
        found = world.divergence("evaluate", answer_logprobs(model, prompts, answers))
    finally:
        torch.set_num_threads(threads)
    assert 0 < found.excess < 0.05
    assert found.outside < 0.02
