"""Text in batches: labels shifted once, the same examples for any number of ranks and after any restart."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from poise.data.synthetic_facts import make_world
from poise.data.text.batches import (
    IGNORE_INDEX,
    TextBatches,
    load_text,
    text_batch,
    text_tokenizer,
)
from poise.data.text.examples import TextExample, word_tokenizer
from poise.data.text.spec import JsonlText, ParquetText, WorldText
from poise.data.world_spec import WorldSpec
from poise.errors import UserError
from poise.models.limits import ModelLimits

WORLD = WorldSpec(entities=4, relations=2, answers=4, tail=3, pretrain=5)
WORDS = word_tokenizer(["what", "is", "red", "green", "blue"])


def examples(n: int = 50) -> list[TextExample]:
    """Example k repeats k + 10 in a prompt of 1 to 3 tokens and k + 100 in a completion of 1 to 4."""
    return [TextExample((k + 10,) * (1 + k % 3), (k + 100,) * (k % 4) + (2,)) for k in range(n)]


def write(folder, *rows, name="part.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def spec(path, **options) -> JsonlText:
    return JsonlText(name="jsonl", path=str(path), **{"validation": 0, **options})


def test_labels_are_the_next_tokens_of_the_completion_and_nothing_else():
    batch = text_batch([TextExample((1, 5, 6), (7, 8, 2)), TextExample((1,), (9, 2))])
    assert batch.ids.tolist() == [[1, 5, 6, 7, 8], [1, 9, 0, 0, 0]]
    assert batch.labels.tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, 7, 8, 2],
        [9, 2, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert {part.dtype for part in (batch.ids, batch.labels, batch.mask)} == {torch.int64}


def test_a_batch_by_a_slow_loop():
    chosen = examples(23)
    batch = text_batch(chosen)
    width = max(len(example.prompt) + len(example.completion) for example in chosen) - 1
    assert batch.ids.shape == (23, width)
    for row, example in enumerate(chosen):
        tokens = [*example.prompt, *example.completion]
        labels = [IGNORE_INDEX] * len(example.prompt) + list(example.completion)
        assert batch.ids[row][batch.mask[row] == 1].tolist() == tokens[:-1]
        assert batch.labels[row].tolist() == labels[1:] + [IGNORE_INDEX] * (width + 1 - len(tokens))


def test_without_a_prompt_the_first_token_is_neither_learned_nor_counted():
    stream = TextBatches([TextExample((), (5, 6, 2)), TextExample((1, 3), (4, 2))], 2, 0)
    assert stream.supervised(0) == int((stream.batch(0).labels != IGNORE_INDEX).sum()) == 4


def test_an_epoch_has_every_example_but_the_remainder_once():
    batches = TextBatches(examples(), 12, seed=3)
    assert batches.batches_per_epoch == 4
    epochs = [[int(k) for i in range(4) for k in batches.batch(4 * e + i).ids[:, 0]] for e in range(3)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_batch_can_be_read_at_any_time():
    sequential = [TextBatches(examples(), 12, seed=3).batch(index) for index in range(9)]
    batches = TextBatches(examples(), 12, seed=3)
    for index in (8, 0, 5, 5, 2):
        found = batches.batch(index)
        for name in ("ids", "labels", "mask"):
            assert torch.equal(getattr(found, name), getattr(sequential[index], name))
    assert not torch.equal(TextBatches(examples(), 12, seed=4).batch(0).ids[:, 0], sequential[0].ids[:, 0])


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_ranks_together_see_what_one_worker_sees(world_size):
    alone = TextBatches(examples(), 12, 3)
    ranks = [TextBatches(examples(), 12, 3, rank, world_size) for rank in range(world_size)]
    for index in (0, 3, 4, 11):
        shares = [rank.batch(index) for rank in ranks]
        for name in ("ids", "labels", "mask"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(alone.batch(index), name))
        learned = sum(int((share.labels != IGNORE_INDEX).sum()) for share in shares)
        assert {rank.supervised(index) for rank in ranks} == {learned} == {alone.supervised(index)}


@pytest.mark.parametrize(("size", "ranks", "message"), [(51, 1, "51 is more than the 50"), (12, 5, "equally by 5")])
def test_impossible_streams_are_refused(size, ranks, message):
    with pytest.raises(UserError, match=message):
        TextBatches(examples(), size, 0, 0, ranks)


def test_a_world_is_read_in_its_own_words():
    text = WorldText(name="world", world=WORLD)
    tokenizer = text_tokenizer(text)
    data = load_text(text, tokenizer, 5)
    assert data.train == make_world(WORLD, 5).examples("pretrain")
    assert len(data.train) == 8 * 5
    prompts = {fact.prompt for fact in make_world(WORLD).facts}
    held_out = {tokenizer.decode(example.prompt, skip_special_tokens=True) for example in data.validation}
    assert held_out == prompts


def test_the_tokenizer_of_another_world_is_refused():
    other = WORLD.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="another world"):
        load_text(WorldText(name="world", world=WORLD), make_world(other).tokenizer(), 0)


def test_a_new_model_has_no_words_for_files(tmp_path):
    with pytest.raises(UserError, match="no tokenizer for text from files"):
        text_tokenizer(spec(tmp_path))


def test_json_lines_and_parquet_give_the_same_examples(tmp_path):
    rows = [{"q": "what is red", "a": " green"}, {"q": "what is blue", "a": " red blue"}, {"q": "is", "a": " red"}]
    write(tmp_path / "lines", rows[0], "\n", rows[1], name="a.jsonl")
    write(tmp_path / "lines", rows[2], name="b.jsonl")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    fields = {"prompt": "q", "completion": "a"}
    lines = load_text(spec(tmp_path / "lines", **fields), WORDS, 0)
    parquet = ParquetText(name="parquet", path=str(tmp_path / "all.parquet"), validation=0, **fields)
    assert load_text(parquet, WORDS, 0) == lines
    assert lines.train == [
        TextExample((1, 3, 4, 5), (6, 2)),
        TextExample((1, 3, 4, 7), (5, 7, 2)),
        TextExample((1, 4), (5, 2)),
    ]


def test_a_bucket_is_read_like_a_folder(tmp_path, s3_store):
    from poise.store.storage import open_storage

    row = json.dumps({"prompt": "what", "completion": " red"}).encode()
    open_storage(s3_store).write("text/part.jsonl", row)
    for path in (f"{s3_store}/text", f"{s3_store}/text/part.jsonl"):
        assert load_text(spec(path), WORDS, 0).train == [TextExample((1, 3), (5, 2))]


def test_validation_is_disjoint_and_drawn_by_the_seed(tmp_path):
    tokenizer = word_tokenizer(str(k) for k in range(40))
    path = write(tmp_path, *({"prompt": str(k), "completion": " 1"} for k in range(40)))
    one, same, other = (load_text(spec(path, validation=8), tokenizer, seed) for seed in (1, 1, 2))
    assert one == same != other
    prompts = [example.prompt[1] for example in one.train + one.validation]
    assert (len(one.train), len(one.validation), sorted(prompts)) == (32, 8, list(range(3, 43)))
    assert len(load_text(spec(path, validation=None), tokenizer, 0).validation) == 4
    with pytest.raises(UserError, match="leaves none to train on"):
        load_text(spec(path, validation=40), tokenizer, 0)


GOOD = {"prompt": "what is", "completion": " red green blue"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{\n", "this line is no JSON"),
        ("[1]\n", "is list, not an object"),
        ({"prompt": "what"}, "no 'completion', only prompt"),
        ({"prompt": "what", "completion": 3}, "'completion' is int, not text"),
        ({"prompt": "what", "completion": " "}, "completion is empty"),
        ({"prompt": "what", "completion": " red\ud800"}, "'completion' has half of a surrogate pair as character 5"),
        ({"prompt": "what", "completion": "red"}, "meet inside the token"),
        ({"prompt": "what", "completion": " red" * 9}, "11 tokens are more than data.max_tokens 10|12 tokens"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    path = write(tmp_path, GOOD, "\n", row)
    with pytest.raises(UserError, match=rf"part\.jsonl:3: .*({message})"):
        load_text(spec(path, max_tokens=10), WORDS, 0)


def test_a_bad_row_of_parquet_is_named(tmp_path):
    pq.write_table(pa.Table.from_pylist([GOOD, {"prompt": "what", "completion": None}]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet:2: 'completion' is NoneType"):
        load_text(ParquetText(name="parquet", path=str(tmp_path)), WORDS, 0)
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"x\.parquet is no Parquet file"):
        load_text(ParquetText(name="parquet", path=str(tmp_path)), WORDS, 0)


def test_long_examples_are_cut_at_their_end_where_that_is_asked_for(tmp_path):
    path = write(tmp_path, GOOD)
    assert load_text(spec(path, max_tokens=5, too_long="cut"), WORDS, 0).train == [TextExample((1, 3, 4), (5, 6))]
    with pytest.raises(UserError, match="the prompt alone fills"):
        load_text(spec(path, max_tokens=3, too_long="cut"), WORDS, 0)


def test_what_the_model_cannot_hold_is_named_or_cut(tmp_path):
    path = write(tmp_path, GOOD, GOOD)
    limits = ModelLimits(vocabulary=8, context=5)
    with pytest.raises(UserError, match=r"part\.jsonl:1: 7 tokens are more than the 5 that the model can hold"):
        load_text(spec(path), WORDS, 0, limits)
    (one, _) = load_text(spec(path, too_long="cut"), WORDS, 0, limits).train
    assert one == TextExample((1, 3, 4), (5, 6))
    with pytest.raises(UserError, match=r"part\.jsonl:1: its tokens go up to 7 and the model has embeddings of 7"):
        load_text(spec(path), WORDS, 0, ModelLimits(vocabulary=7))
    world = WorldText(name="world", world=WORLD)
    for limits, message in ((ModelLimits(vocabulary=5), "embeddings of 5"), (ModelLimits(context=6), "6 of the model")):
        with pytest.raises(UserError, match=message):
            load_text(world, text_tokenizer(world), 0, limits)


def test_an_unknown_word_that_is_the_end_as_well_is_no_unknown_word():
    """GPT-2 has one special token for everything."""
    world = WorldText(name="world", world=WORLD)
    tokenizer = text_tokenizer(world)
    before = load_text(world, tokenizer, 0)
    tokenizer.unk_token = tokenizer.eos_token
    assert load_text(world, tokenizer, 0) == before


def test_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, message in (
        (tmp_path, "no row"),
        (tmp_path / "none.jsonl", "is no file"),
        (tmp_path / "sub", "no folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_text(spec(path), WORDS, 0)
