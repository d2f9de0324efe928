"""One convention for what begins and ends a text, for families whose tokenizers and configs disagree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from poise.data.text.batches import text_batch
from poise.data.text.examples import (
    TextExample,
    answer_after,
    encode_completion,
    encode_example,
    encode_examples,
    encode_prompt,
    encode_prompts,
)
from poise.errors import UserError
from poise.inference.sampler import Decoding, Request
from poise.inference.transformers_sampler import TransformersSampler
from poise.models.language import answer_logprobs, export, open_folder, open_tokenizer
from poise.models.model_folder import read_folder
from poise.models.special_tokens import added_tokens, reconcile

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "mistral")
BEGIN = {"llama": (1,), "gemma2": (2,), "mistral": (1,)}
EOS = {"llama": 2, "qwen2": 2, "gpt2": 0, "gemma2": 1, "mistral": 2}
STOP = {"llama": {2}, "qwen2": {0, 2}, "gpt2": {0}, "gemma2": {1, 4}, "mistral": {2}}


@pytest.fixture
def copy(family_folder, tmp_path):
    def make(family: str) -> Path:
        return Path(shutil.copytree(family_folder(family), tmp_path / family))

    return make


def change_json(file: Path, **values: object) -> None:
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in {**known, **values}.items() if value is not None}))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_samplers_and_export_agree_on_what_ends_a_text(family, family_folder, tmp_path):
    folder = family_folder(family)
    model, tokenizer = open_folder(folder)
    special = reconcile(model, tokenizer)
    assert special.eos == EOS[family] == encode_completion(tokenizer, "The cat")[-1]
    assert special.stop == STOP[family] == read_folder(folder).stop
    assert bool(special.notes) == (family == "qwen2")
    export(model, tokenizer, tmp_path)
    assert read_folder(tmp_path).stop == STOP[family]
    again = reconcile(*open_folder(tmp_path))
    assert (again.eos, again.stop, again.notes) == (special.eos, special.stop, ())
    for name in ("config.json", "generation_config.json"):
        stated = json.loads((tmp_path / name).read_text())["eos_token_id"]
        assert (stated if isinstance(stated, list) else [stated])[0] == EOS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_begins_once_and_does_not_end(family, family_folder):
    tokenizer = open_tokenizer(family_folder(family))
    begin = BEGIN.get(family, ())
    assert added_tokens(tokenizer) == (begin, (2,) if family == "mistral" else ())
    plain = tuple(tokenizer("The cat", add_special_tokens=False).input_ids)
    assert encode_prompt(tokenizer, "The cat") == (*begin, *plain)
    assert encode_prompt(tokenizer, "") == begin
    if begin:
        rendered = encode_prompt(tokenizer, f"{tokenizer.bos_token}The cat")
        assert rendered.count(begin[0]) == 1
        assert rendered[0] == begin[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_has_the_tokens_that_it_has_in_the_whole_text(family, family_folder):
    tokenizer = open_tokenizer(family_folder(family))
    for prompt, completion in (
        ("The dog", " sat on the mat."),
        ("Question: who wrote the poem? Answer:", " the old poet"),
        ("The d", "og"),
        ("", "The cat"),
    ):
        try:
            example = encode_example(tokenizer, prompt, completion)
        except UserError as error:
            assert "meet inside the token" in str(error)  # noqa: PT017 - some tokenizers learn "dog", others do not
            continue
        whole = (*example.prompt, *example.completion[:-1])
        assert whole == encode_prompt(tokenizer, prompt + completion)
        assert example.prompt == encode_prompt(tokenizer, prompt)
        assert example.completion[-1] == EOS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_many_texts_in_one_call_have_the_tokens_of_each_alone(family, family_folder):
    tokenizer = open_tokenizer(family_folder(family))
    pairs = [
        ("The dog", " sat on the mat."),
        ("", "The cat"),
        ("Who? " * 90, "\u00e9\u4e2d the cat  sat"),
        ("", "The cat"),
    ]
    pairs = [*pairs, *((f"Number {number}:", f" {number**2}") for number in range(1100))]
    alone = [encode_example(tokenizer, *pair) for pair in pairs]
    together = list(encode_examples(tokenizer, pairs))
    assert together == alone
    assert together[1] is together[3]
    prompts = [prompt for prompt, _ in pairs]
    assert encode_prompts(tokenizer, prompts) == [encode_prompt(tokenizer, prompt) for prompt in prompts]
    assert encode_prompts(tokenizer, []) == list(encode_examples(tokenizer, [])) == []
    for pair, (prompt, completion) in zip(alone[:3], pairs, strict=False):
        begin = BEGIN.get(family, ())
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        assert pair.prompt == (*begin, *before)
        assert (*before, *pair.completion[:-1]) == tuple(
            tokenizer(prompt + completion, add_special_tokens=False).input_ids
        )


def test_the_example_that_cannot_be_encoded_is_refused_where_it_comes(family_folder):
    encoded = encode_examples(
        open_tokenizer(family_folder("llama")), [("The", " cat"), ("The c", "at sat"), ("The", " cat")]
    )
    next(encoded)
    with pytest.raises(UserError, match="meet inside the token 'cat'"):
        next(encoded)


def test_sentencepiece_adds_no_space_between_a_prompt_and_its_completion(family_folder):
    """Tokenized alone, the completion would begin with a space that the text does not have."""
    tokenizer = open_tokenizer(family_folder("llama"))
    example = encode_example(tokenizer, "The zx", "zq sat")
    text = tokenizer.decode([*example.prompt, *example.completion], skip_special_tokens=True)
    assert text == "The zxzq sat"
    apart = tokenizer("The zx").input_ids + tokenizer("zq sat", add_special_tokens=False).input_ids
    assert tokenizer.decode(apart, skip_special_tokens=True) == "The zx zq sat"


@pytest.mark.parametrize(("family", "token"), [("llama", "cat"), ("gpt2", " cat"), ("qwen2", " cat")])
def test_a_border_inside_a_token_is_refused(family, token, family_folder):
    tokenizer = open_tokenizer(family_folder(family))
    with pytest.raises(UserError, match=f"meet inside the token '{token}'"):
        encode_example(tokenizer, "The c", "at sat")
    with pytest.raises(UserError, match="a space belongs to the beginning of the completion"):
        encode_example(tokenizer, "The ", "cat sat")


def test_an_end_that_is_written_out_is_not_doubled(family_folder):
    tokenizer = open_tokenizer(family_folder("qwen2"))
    written, added = (encode_completion(tokenizer, text, "The") for text in (" cat<|im_end|>", " cat"))
    assert written == added
    assert added.count(2) == 1


def test_a_listed_answer_follows_its_question_as_text_does():
    assert answer_after("What?", "Paris") == " Paris"
    assert answer_after("What?\n", "Paris") == "Paris"
    assert answer_after("", "Paris") == "Paris"


def test_a_tokenizer_without_an_end_takes_that_of_the_model(copy, tmp_path):
    folder = copy("llama")
    change_json(folder / "tokenizer_config.json", eos_token=None)
    model, tokenizer = open_folder(folder)
    assert tokenizer.eos_token_id is None
    special = reconcile(model, tokenizer)
    assert "the tokenizer has no EOS" in special.notes[0]
    assert encode_completion(tokenizer, "The cat")[-1] == 2 == special.eos
    export(model, tokenizer, tmp_path / "left")
    assert open_tokenizer(tmp_path / "left").eos_token_id == 2


@pytest.mark.parametrize("stated", [(), ("config.json",), ("generation_config.json",)])
def test_what_no_file_states_is_the_same_for_training_and_samplers(stated, copy):
    """The class of a config has an EOS of its own: 2 for Llama, and 50256 for GPT-2."""
    for family in ("llama", "gpt2", "mistral"):
        folder = copy(family)
        change_json(folder / "tokenizer_config.json", eos_token=None)
        for name in {"config.json", "generation_config.json"} - set(stated):
            settings = json.loads((folder / name).read_text())
            del settings["eos_token_id"]
            (folder / name).write_text(json.dumps(settings))
        of_sampler, of_training = read_folder(folder).special, reconcile(*open_folder(folder))
        assert (of_sampler.eos, of_sampler.stop) == (of_training.eos, of_training.stop)


def test_ends_beyond_the_embedding_are_never_said(copy):
    folder = copy("llama")
    change_json(folder / "generation_config.json", eos_token_id=[2, 50_256])
    assert read_folder(folder).stop == {2}
    assert "50256 is beyond the embedding" in read_folder(folder).special.notes[0]
    change_json(folder / "tokenizer_config.json", eos_token="<far>")
    with pytest.raises(UserError, match=r"the EOS of the tokenizer is token \d+, and the model has embeddings of \d+"):
        reconcile(*open_folder(folder))


def test_a_model_trained_to_stop_with_one_token_stops_there(family_folder, tmp_path):
    """The fault as it was met: trained to the tokenizer's EOS, sampled until the generation config's."""
    torch.set_num_threads(1)
    model, tokenizer = open_folder(family_folder("qwen2"))
    reconcile(model, tokenizer)
    example = encode_example(tokenizer, "The capital of France is", " Paris")
    batch = text_batch([example] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    export(model, tokenizer, tmp_path)
    sampler = TransformersSampler(tmp_path)
    (samples,) = sampler.generate([Request("q", example.prompt, 8, 0)], Decoding(16))
    said = [sample for sample in samples if sample.tokens == example.completion]
    assert len(said) >= 6
    assert {sample.finish for sample in said} == {"stop"}


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_an_answer_has_the_probability_of_all_its_ends(family, family_folder):
    """By brute force: the sum over the stop tokens; and a sampler that stops at any of them says it as often."""
    model, tokenizer = open_folder(family_folder(family))
    stop = reconcile(model, tokenizer).stop
    prompt, answer = encode_prompt(tokenizer, "The cat"), encode_completion(tokenizer, " sat", "The cat")
    (together,), (alone,) = (answer_logprobs(model, [prompt], [[answer]], stop=ends)[0] for ends in (stop, ()))
    variants = [(*answer[:-1], end) for end in stop]
    each = answer_logprobs(model, [prompt], [variants])[0]
    assert float(together) == pytest.approx(float(each.logsumexp(0)), abs=1e-5)
    assert float(together) > float(alone)
    cut = answer_logprobs(model, [prompt], [[answer[:-1]]], stop=stop)[0]
    assert float(cut[0]) == pytest.approx(float(answer_logprobs(model, [prompt], [[answer[:-1]]])[0][0]), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_in_the_padding_changes_nothing(family, family_folder):
    model, _ = open_folder(family_folder(family))
    batch = text_batch([TextExample((3, 5), (6, 7, 8, 9)), TextExample((3,), (5, 2))])
    logits = []
    for filler in (0, 11):
        ids = torch.where(batch.mask == 1, batch.ids, filler)
        logits.append(model.eval()(input_ids=ids, attention_mask=batch.mask, use_cache=False).logits[batch.mask == 1])
    assert torch.equal(*logits)


def test_the_stories_of_the_real_llama_end_as_its_folder_says(shared_data):
    folder = shared_data / "lm" / "stories260K-hf-hd32"
    assert read_folder(folder).stop == {1, 2}
    assert load_file(folder / "model.safetensors")
