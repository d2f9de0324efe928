"""Prompts and completions as tokens, read from a world or from files, and batches of them with random access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.data.order import GlobalBatches, hold_out
from poise.data.synthetic_facts import make_world
from poise.data.text.examples import TextExample, encode_answers, encode_examples
from poise.data.text.records import Row, read_pair
from poise.data.text.spec import TextRows, TextSpec, WorldText
from poise.data.validation import num_validation
from poise.errors import UserError
from poise.models.limits import NO_LIMITS, ModelLimits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "IGNORE_INDEX",
    "TextBatch",
    "TextBatches",
    "TextData",
    "TextExample",
    "encode_rows",
    "load_text",
    "text_batch",
    "text_tokenizer",
]

IGNORE_INDEX = -100
"""The label of a position that no loss is computed for."""


@dataclass(frozen=True)
class TextData:
    """The training examples and the examples held out for validation."""

    train: list[TextExample]
    validation: list[TextExample]


@dataclass(frozen=True)
class TextBatch:
    """b sequences, padded on the right to the length T of the longest sequence of the global batch of all ranks.

    ids: (b, T) int64, every token but the last of each sequence.
    labels: (b, T) int64, the next token of each position. They are already shifted: compare them with the logits of
        the same position. IGNORE_INDEX where the next token belongs to the prompt, and on padding.
    mask: (b, T) int64, 0 on padding.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor


def text_tokenizer(spec: TextSpec) -> Tokenizer:
    """The tokenizer of a model that is trained from scratch on this text, which must be a world.

    Raises:
        UserError: text from files, which defines no vocabulary.
    """
    if spec.known_world is None:
        raise UserError("a new model has no tokenizer for text from files: name a `run` or `folder` with a model")
    return make_world(spec.known_world).tokenizer()


def load_text(spec: TextSpec, tokenizer: Tokenizer, seed: int, limits: ModelLimits = NO_LIMITS) -> TextData:
    """Read a data set as tokens of a model.

    `seed` draws the samples of a world, or the validation examples of files.

    Raises:
        UserError: files are missing or malformed; an example is too long for the spec, exceeds the `limits` of the
            model or has nothing to learn (all with file and line); or the tokenizer lacks words of the world.
    """
    if isinstance(spec, WorldText):
        world = make_world(spec.world, seed)
        train = _encode_world(world.texts(spec.split), tokenizer)
        validation = _encode_world(world.texts("validation"), tokenizer)
        _check_limits([*train, *validation], limits)
        return TextData(train, validation)
    examples = encode_rows(spec.read_rows(), spec, tokenizer, limits)
    train_rows, validation_rows = hold_out(len(examples), num_validation(spec.validation, len(examples)), seed)
    train = [examples[row] for row in train_rows.tolist()]
    validation = [examples[row] for row in validation_rows.tolist()]
    return TextData(train, validation)


class TextBatches:
    """The training stream, with random access: `batch(i)` is a pure function of the arguments and of i.

    The order of the examples is that of `GlobalBatches`.
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
        """`batch_size` is the sum over all ranks.

        Raises:
            UserError: fewer examples than one batch, or a batch that the ranks cannot share equally.
        """
        self._global = GlobalBatches(len(examples), batch_size, seed, rank, world_size, key="batch_size")
        self.batches_per_epoch = self._global.per_epoch
        self._corpus = _Corpus(examples)
        self._device = torch.device(device)

    def batch(self, index: int) -> TextBatch:
        """This rank's share of global batch `index`, counted from 0 over all epochs."""
        rows = self._global.rows(index)
        width = int(self._corpus.lengths[rows].max())  # the longest sequence of all ranks
        batch = self._corpus.batch(rows[self._global.share], width)
        return TextBatch(batch.ids.to(self._device), batch.labels.to(self._device), batch.mask.to(self._device))

    def supervised(self, index: int) -> int:
        """The number of learned tokens in global batch `index`, over all ranks."""
        return int(self._corpus.supervised[self._global.rows(index)].sum())


def text_batch(examples: Sequence[TextExample]) -> TextBatch:
    """The examples as one batch, in their order, on the CPU."""
    corpus = _Corpus(examples)
    return corpus.batch(torch.arange(len(examples)), int(corpus.lengths.max()))


class _Corpus:
    """The tokens of all N examples concatenated in one tensor, so that a batch of any size is one gather.

    starts: (N,) place of the first token of each example in `tokens`.
    lengths: (N,) number of inputs, one less than the number of tokens, since the last token is a label only.
    first: (N,) the input whose label is the first token of the completion; -1 without a prompt.
    supervised: (N,) number of labels that are learned.
    """

    def __init__(self, examples: Sequence[TextExample]) -> None:
        self.tokens = torch.tensor([token for example in examples for token in (*example.prompt, *example.completion)])
        prompts = torch.tensor([len(example.prompt) for example in examples])
        sizes = prompts + torch.tensor([len(example.completion) for example in examples])
        self.starts = sizes.cumsum(0) - sizes
        self.lengths = sizes - 1
        self.first = prompts - 1
        # without a prompt, no input predicts the first token of the completion
        self.supervised = self.lengths - self.first.clamp(min=0)

    def batch(self, rows: Tensor, width: int) -> TextBatch:
        """The b examples at `rows`, padded to `width` = T: inputs without the last token, labels without the first."""
        column = torch.arange(width)  # (T,)
        inside = column < self.lengths[rows][:, None]  # (b, T)
        # padding reads place 0, so that every index is valid; its value is replaced below
        places = torch.where(inside, self.starts[rows][:, None] + column, 0)
        ids = torch.where(inside, self.tokens[places], 0)
        learned = inside & (column >= self.first[rows][:, None])
        labels = torch.where(learned, self.tokens[places + 1], IGNORE_INDEX)
        return TextBatch(ids, labels, inside.long())


def _encode_world(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> list[TextExample]:
    """Texts of a world as tokens; UserError where the tokenizer lacks one of their words.

    The last token of a completion is not looked at: it is EOS, which some models share with the unknown word.
    """
    examples = encode_answers(pairs, tokenizer)
    unknown = tokenizer.unk_token_id
    for example, texts in zip(examples, pairs, strict=True):
        if unknown is not None and unknown in (*example.prompt, *example.completion[:-1]):
            raise UserError(f"the model has no tokens for {' '.join(texts)!r}: it was trained on another world")
    return examples


def encode_rows(rows: Sequence[Row], spec: TextRows, tokenizer: Tokenizer, limits: ModelLimits) -> list[TextExample]:
    """The tokens of every row; UserError that names the first row that cannot be learned."""
    pairs, unreadable = _read_pairs(rows, spec)
    encoded = encode_examples(tokenizer, pairs)
    examples: list[TextExample] = []
    for row in rows[: len(pairs)]:
        try:
            example = next(encoded)
            limits.check_ids((*example.prompt, *example.completion))
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        examples.append(_limit_length(example, row.where, spec, limits))
    if unreadable is not None:
        raise unreadable
    return examples


def _read_pairs(rows: Sequence[Row], spec: TextRows) -> tuple[list[tuple[str, str]], UserError | None]:
    """The prompts and completions of the rows before the first that has none, and the error of that row."""
    pairs: list[tuple[str, str]] = []
    for row in rows:
        try:
            pairs.append(read_pair(row, spec))
        except UserError as error:
            return pairs, error
    return pairs, None


def _limit_length(example: TextExample, where: str, spec: TextRows, limits: ModelLimits) -> TextExample:
    """The example, its completion cut where `too_long` is cut; UserError where it is too long otherwise."""
    size = len(example.prompt) + len(example.completion)
    max_tokens = min(spec.max_tokens, limits.context)
    if size <= max_tokens:
        return example
    model_is_limit = limits.context < spec.max_tokens
    limit = f"the {max_tokens} that the model can hold" if model_is_limit else f"data.max_tokens {max_tokens}"
    if spec.too_long != "cut":
        advice = "shorten it" if model_is_limit else "raise it"
        raise UserError(f"{where}: {size} tokens are more than {limit}; {advice} or set too_long: cut")
    room = max_tokens - len(example.prompt)
    if room < 1:
        raise UserError(f"{where}: the prompt alone fills {limit}; nothing to learn would be left")
    return TextExample(example.prompt, example.completion[:room])


def _check_limits(examples: Sequence[TextExample], limits: ModelLimits) -> None:
    """UserError for an example of a world that is too long for the model or has tokens without embeddings."""
    for example in set(examples):
        tokens = (*example.prompt, *example.completion)
        limits.check_ids(tokens)
        if len(tokens) > limits.context:
            raise UserError(f"an example of {len(tokens)} tokens is more than the {limits.context} of the model")
