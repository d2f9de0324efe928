"""Prompts and completions in tokens: from a world or from files, and in batches that any step can be read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.data.examples import TextExample, encode_answers, encode_example
from poise.data.rows import Row, read_pair, read_rows
from poise.data.spec import JsonlText, ParquetText, TextSpec, WorldText, num_validation
from poise.data.worlds import make_world
from poise.errors import UserError
from poise.models.limits import NO_LIMITS, ModelLimits
from poise.spec.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "IGNORED",
    "TextBatch",
    "TextBatches",
    "TextData",
    "TextExample",
    "encode_rows",
    "load_text",
    "text_batch",
    "text_tokenizer",
]

IGNORED = -100
"""The label of a position that is not learned."""


@dataclass(frozen=True)
class TextData:
    """What is trained on, and what is held out."""

    train: list[TextExample]
    validation: list[TextExample]


@dataclass(frozen=True)
class TextBatch:
    """A batch of b sequences padded on the right to the T of the longest of the whole batch, all ranks counted.

    ids: (b, T) int64. labels: (b, T) int64, the next token of each position (shifted already: compare with the logits
    of the same position), IGNORED where the next token belongs to a prompt or there is none. mask: (b, T) int64, 0 on
    padding.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor


def text_tokenizer(spec: TextSpec) -> Tokenizer:
    """The tokenizer of a model that is trained from scratch on this text: that of its world.

    Raises:
        UserError: text from files, which has no vocabulary of its own.
    """
    if not isinstance(spec, WorldText):
        raise UserError("a new model has no tokenizer for text from files: name a `run` or `folder` with a model")
    return make_world(spec.world).tokenizer()


def load_text(spec: TextSpec, tokenizer: Tokenizer, seed: int, limits: ModelLimits = NO_LIMITS) -> TextData:
    """Read a data set in tokens of a model; `seed` draws the samples of a world, or what is held out of files.

    Raises:
        UserError: files that are missing or hold something else, an example that is too long for the spec or beyond
            the `limits` of the model or has nothing to learn (all with file and line), or a world that the tokenizer
            has no words for.
    """
    if isinstance(spec, WorldText):
        world = make_world(spec.world, seed)
        train, validation = (_known(world.texts(split), tokenizer) for split in (spec.split, "validation"))
        _check_limits([*train, *validation], limits)
        return TextData(train, validation)
    rows = read_rows(spec.path, ".jsonl" if spec.name == "jsonl" else ".parquet")
    examples = encode_rows(rows, spec, tokenizer, limits)
    held_out = num_validation(spec, len(examples))
    if held_out >= len(examples):
        raise UserError(f"data.validation: {held_out} held out of {len(examples)} examples leaves none to train on")
    order = _permutation(len(examples), derive_seed(seed, "validation")).tolist()
    validation_rows, train_rows = sorted(order[:held_out]), sorted(order[held_out:])
    return TextData([examples[row] for row in train_rows], [examples[row] for row in validation_rows])


class TextBatches:
    """The training stream, with random access: `batch(i)` is a pure function of the arguments and of i.

    An epoch is one seeded permutation of the examples, cut into `batches_per_epoch` global batches; the remainder that
    fills no batch is dropped, another one each epoch. Ranks take equal slices of what a single worker would see.
    """

    def __init__(
        self,
        examples: Sequence[TextExample],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """`batch_size` counts all ranks.

        Raises:
            UserError: fewer examples than one batch, or a batch that the ranks cannot share equally.
        """
        if len(examples) < batch_size:
            raise UserError(f"batch_size: {batch_size} is more than the {len(examples)} training examples")
        if batch_size % world_size:
            raise UserError(f"batch_size: {batch_size} examples cannot be shared equally by {world_size} workers")
        self.batches_per_epoch = len(examples) // batch_size
        self._corpus, self._device = _Corpus(examples), torch.device(device)
        self._batch_size, self._seed = batch_size, seed
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, index: int) -> TextBatch:
        """This rank's share of global batch `index`, from 0 over all epochs."""
        rows = self._rows(index)
        found = self._corpus.batch(rows[self._slice], int(self._corpus.lengths[rows].max()))
        return TextBatch(*(part.to(self._device) for part in (found.ids, found.labels, found.mask)))

    def supervised(self, index: int) -> int:
        """How many tokens are learned in global batch `index`, all ranks counted."""
        return int(self._corpus.supervised[self._rows(index)].sum())

    def _rows(self, index: int) -> Tensor:
        epoch, offset = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            order = _permutation(self._corpus.lengths.numel(), derive_seed(self._seed, "order", epoch))
            self._epoch, self._order = epoch, order
        return self._order[offset * self._batch_size : (offset + 1) * self._batch_size]


def text_batch(examples: Sequence[TextExample]) -> TextBatch:
    """All these examples as one batch, in their order, on the CPU."""
    corpus = _Corpus(examples)
    return corpus.batch(torch.arange(len(examples)), int(corpus.lengths.max()))


class _Corpus:
    """Examples end to end in one tensor, so that a batch of any size is one gather."""

    def __init__(self, examples: Sequence[TextExample]) -> None:
        self.tokens = torch.tensor([token for example in examples for token in (*example.prompt, *example.completion)])
        prompts = torch.tensor([len(example.prompt) for example in examples])
        sizes = prompts + torch.tensor([len(example.completion) for example in examples])
        self.starts, self.lengths, self.first = sizes.cumsum(0) - sizes, sizes - 1, prompts - 1
        self.supervised = self.lengths - self.first.clamp(min=0)  # without a prompt, nothing says the first token

    def batch(self, rows: Tensor, width: int) -> TextBatch:
        """The examples at `rows`, each without its last token, beside themselves without their first one."""
        column = torch.arange(width)
        inside = column < self.lengths[rows][:, None]
        places = torch.where(inside, self.starts[rows][:, None] + column, 0)
        ids = torch.where(inside, self.tokens[places], 0)
        learned = inside & (column >= self.first[rows][:, None])
        labels = torch.where(learned, self.tokens[places + 1], IGNORED)
        return TextBatch(ids, labels, inside.long())


def _known(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> list[TextExample]:
    """Texts of a world in tokens, none of them the unknown word, which some models use as EOS too."""
    examples, unknown = encode_answers(pairs, tokenizer), tokenizer.unk_token_id
    for example, texts in zip(examples, pairs, strict=True):
        if unknown is not None and unknown in (*example.prompt, *example.completion[:-1]):
            raise UserError(f"the model has no tokens for {' '.join(texts)!r}: it was trained on another world")
    return examples


def encode_rows(
    rows: Sequence[Row], spec: JsonlText | ParquetText, tokenizer: Tokenizer, limits: ModelLimits
) -> list[TextExample]:
    """Every row in tokens; UserError that names the row that cannot be learned."""
    encoded = lru_cache(maxsize=65_536)(partial(encode_example, tokenizer))
    examples = []
    for row in rows:
        prompt, completion = read_pair(row, spec)
        try:
            example = encoded(prompt, completion)
            limits.check_ids((*example.prompt, *example.completion))
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        examples.append(_fitted(example, row.where, spec, limits))
    return examples


def _fitted(example: TextExample, where: str, spec: JsonlText | ParquetText, limits: ModelLimits) -> TextExample:
    size = len(example.prompt) + len(example.completion)
    of_model = limits.context < spec.max_tokens
    most = min(spec.max_tokens, limits.context)
    if size <= most:
        return example
    limit = f"the {most} that the model can hold" if of_model else f"data.max_tokens {most}"
    if spec.too_long != "cut":
        cure = "shorten it" if of_model else "raise it"
        raise UserError(f"{where}: {size} tokens are more than {limit}; {cure} or set too_long: cut")
    room = most - len(example.prompt)
    if room < 1:
        raise UserError(f"{where}: the prompt alone fills {limit}; nothing to learn would be left")
    return TextExample(example.prompt, example.completion[:room])


def _check_limits(examples: Sequence[TextExample], limits: ModelLimits) -> None:
    """UserError for an example of a world that the model cannot hold."""
    for example in set(examples):
        tokens = (*example.prompt, *example.completion)
        limits.check_ids(tokens)
        if len(tokens) > limits.context:
            raise UserError(f"an example of {len(tokens)} tokens is more than the {limits.context} of the model")


def _permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
