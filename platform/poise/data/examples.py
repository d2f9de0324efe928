"""Examples and questions as text and as tokens: what a model is trained on, and what it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from poise.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Question", "TextExample", "encode", "encode_completion", "encode_prompt", "word_tokenizer"]

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


@dataclass(frozen=True)
class TextExample:
    """Token ids of a prompt, BOS included where the tokenizer sets it, and of what is to follow, EOS included."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question in words, the answers that count as correct, and the true probability of each answer if it is known.

    `answers` grades, `distribution` measures: in a world the accepted answer is one draw from the distribution, so that
    who answers with the probability p is right with the probability p.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    distribution: Mapping[str, float] | None = None
    group: str = ""


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The tokens of a prompt, with those that the tokenizer puts before it (BOS)."""
    return tuple(tokenizer(text).input_ids)


def encode_completion(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The tokens of an answer and EOS. UserError if the tokenizer has no EOS."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer of this model has no EOS token: an answer could not end")
    return (*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id)


def encode(pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[TextExample]:
    """Prompts and completions as tokens; equal texts are tokenized once."""

    @lru_cache(maxsize=65_536)
    def prompt(text: str) -> tuple[int, ...]:
        return encode_prompt(tokenizer, text)

    @lru_cache(maxsize=65_536)
    def completion(text: str) -> tuple[int, ...]:
        return encode_completion(tokenizer, text)

    return [TextExample(prompt(before), completion(after)) for before, after in pairs]


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """One token a word: 0 is the unknown word and the padding, 1 BOS, 2 EOS, then the words in the order given."""
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([UNKNOWN, BEGIN, END, *words])}
    inner = Words(WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=UNKNOWN, pad_token=UNKNOWN, bos_token=BEGIN, eos_token=END
    )
