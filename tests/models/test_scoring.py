"""Logits in bounded portions: the same numbers as all at once, for every family, and never more memory than allowed."""

from __future__ import annotations

import os
import resource
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from poise.data.text.batches import IGNORE_INDEX, text_batch
from poise.data.text.examples import TextExample
from poise.kinds.common.language_evaluation import held_out
from poise.models.language import answer_logprobs, open_folder
from poise.models.scoring import position_logits
from poise.store.runs import open_run
from poise.train.context import Context


def examples(n: int = 23) -> list[TextExample]:
    return [TextExample(tuple(range(3, 4 + 5 * k % 7)), tuple(range(5, 6 + k % 4))) for k in range(n)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("bounds", [(1, 1), (700, 20), (10_000, 60), (10**9, 10**9)])
def test_portions_of_any_size_give_the_logits_of_the_whole(family, bounds, family_folder):
    model = open_folder(family_folder(family))[0].eval()
    batch = text_batch(examples())
    selected = batch.labels != IGNORE_INDEX
    with torch.no_grad():
        whole = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        seen = torch.zeros_like(batch.ids)
        options = dict(zip(("values_at_once", "tokens_at_once"), bounds, strict=True))
        for part in position_logits(model, batch.ids, batch.mask, selected, **options):
            seen[part.rows, part.columns] += 1
            torch.testing.assert_close(part.logits, whole[part.rows, part.columns], rtol=1e-4, atol=1e-5)
    assert torch.equal(seen, selected.long())


class Wide(nn.Module):
    """A model of a large vocabulary that remembers how many logits it was asked for at once."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.embedding, self.head = nn.Embedding(64, 4), nn.Linear(4, vocabulary, bias=False)
        self.largest = 0

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep=slice(None)):
        logits = self.head(self.embedding(input_ids)[:, logits_to_keep])
        self.largest = max(self.largest, logits.numel())
        return SimpleNamespace(logits=logits)


class AllLogits(Wide):
    """The same where the head cannot be applied to some positions only."""

    def forward(self, input_ids, attention_mask, use_cache):
        return super().forward(input_ids, attention_mask, use_cache)


@pytest.mark.parametrize(("model_class", "bound"), [(Wide, 2**13), (AllLogits, 13 * 1000)])
def test_no_more_logits_are_asked_for_than_allowed(model_class, bound, monkeypatch, tmp_path):
    monkeypatch.setattr("poise.models.scoring.VALUES_AT_ONCE", 2**13)
    model, context = model_class(1000), Context(open_run(tmp_path, "x"))
    found = held_out(model, examples(), context)
    assert 0 < model.largest <= bound
    monkeypatch.setattr("poise.models.scoring.VALUES_AT_ONCE", 2**30)
    assert held_out(model, examples(), context) == pytest.approx(found, rel=1e-6)
    assert model.largest > 2**15
    prompts, answers = [e.prompt for e in examples()], [[e.completion] for e in examples()]
    whole = torch.cat(answer_logprobs(model, prompts, answers))
    model.largest = 0
    monkeypatch.setattr("poise.models.scoring.VALUES_AT_ONCE", 2**13)
    torch.testing.assert_close(torch.cat(answer_logprobs(model, prompts, answers)), whole)
    assert 0 < model.largest <= bound


def test_the_memory_of_an_evaluation_is_bounded(tmp_path, monkeypatch):
    """24 sequences of 61 tokens and 30,000 words: their logits alone would take 176 MB, several times over."""
    rows = [TextExample((1,), tuple(range(2, 62))) for _ in range(24)]
    monkeypatch.setattr("poise.models.scoring.VALUES_AT_ONCE", 2**22)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # a process of its own has a peak of its own
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = Wide(30_000)
        torch.set_num_threads(1)
        held_out(model, rows, Context(open_run(tmp_path, "x")))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writer, str(grown).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert int(os.read(reader, 100)) < 160 * 1024  # KiB
    os.close(reader)
