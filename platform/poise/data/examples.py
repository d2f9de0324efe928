"""Examples and questions as text and as tokens: what a model is trained on, and what it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from poise.errors import UserError
from poise.models.special_tokens import added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "Question",
    "TextExample",
    "answer_after",
    "encode_answers",
    "encode_completion",
    "encode_example",
    "encode_prompt",
    "word_tokenizer",
]

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
    """The tokens of a prompt, which begins with BOS where the tokenizer sets it (see `poise.models.special_tokens`)."""
    return _begun(tokenizer, _plain(tokenizer, text))


def encode_completion(tokenizer: Tokenizer, text: str, prompt: str = "") -> tuple[int, ...]:
    """The tokens of a text that follows `prompt`, and EOS; UserError as `encode_example`."""
    return encode_example(tokenizer, prompt, text).completion


def encode_example(tokenizer: Tokenizer, prompt: str, completion: str) -> TextExample:
    """The tokens of a prompt and of the text that follows it, as they are in the whole text.

    Tokenized alone, a completion may begin otherwise: SentencePiece puts a space before any text. EOS is added unless
    the completion ends with it already.

    Raises:
        UserError: the tokenizer has no EOS, or has a token that holds the end of the prompt and the beginning of the
            completion: whoever asks with the prompt would ask with other tokens than were learned.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer of this model has no EOS token: an answer could not end")
    before, whole = _plain(tokenizer, prompt), _plain(tokenizer, prompt + completion)
    if whole[: len(before)] != before:
        raise UserError(_moved_border(tokenizer, before, whole))
    after = whole[len(before) :]
    end = () if after[-1:] == (tokenizer.eos_token_id,) else (tokenizer.eos_token_id,)
    return TextExample(_begun(tokenizer, before), (*after, *end))


def answer_after(prompt: str, answer: str) -> str:
    """A listed answer as the text that follows its question: one space lies between the two, or the prompt's own."""
    return answer if not prompt or prompt[-1].isspace() else f" {answer}"


def encode_answers(pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[TextExample]:
    """Questions and their listed answers as tokens; equal texts are tokenized once. UserError as `encode_example`."""
    encoded = lru_cache(maxsize=65_536)(partial(encode_example, tokenizer))
    return [encoded(question, answer_after(question, answer)) for question, answer in pairs]


def _plain(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Without what the tokenizer adds to every text."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _begun(tokenizer: Tokenizer, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """With what the tokenizer puts before every text, once."""
    begin, _ = added_tokens(tokenizer)
    return tokens if tokens[: len(begin)] == begin else (*begin, *tokens)


def _moved_border(tokenizer: Tokenizer, before: tuple[int, ...], whole: tuple[int, ...]) -> str:
    same = next((at for at, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other), len(whole))
    token = tokenizer.decode(list(whole[same : same + 1]))
    return (
        f"the prompt and its completion meet inside the token {token!r}: let the prompt end before it, and the "
        "completion begin with it (a space belongs to the beginning of the completion)"
    )


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
