"""Training examples and questions for language models, as text and as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    "encode_examples",
    "encode_prompt",
    "encode_prompts",
    "word_tokenizer",
]

_BATCH = 1024
"""Examples whose texts are given to the tokenizer in one call."""

_UNKNOWN = "<unk>"
_BEGIN = "<s>"
_END = "</s>"


@dataclass(frozen=True)
class TextExample:
    """Token ids of a prompt, with BOS where the tokenizer sets it, and of its completion, with EOS."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question in words, the answers that count as correct, and the true probability of each answer if it is known.

    Responses are graded with `answers`; `distribution` is used to measure a model exactly. In a world, the accepted
    answer is one draw from `distribution`, so an answer of true probability p is correct with probability p.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    distribution: Mapping[str, float] | None = None
    group: str = ""


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The tokens of a prompt, with BOS first where the tokenizer sets it (see `poise.models.special_tokens`)."""
    return encode_prompts(tokenizer, [text])[0]


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """As `encode_prompt`, for several prompts at once."""
    tokens = _tokenize(tokenizer, texts)
    return [_with_prefix(tokenizer, tokens[text]) for text in texts]


def encode_completion(tokenizer: Tokenizer, text: str, prompt: str = "") -> tuple[int, ...]:
    """The tokens of a text that follows `prompt`, and EOS; UserError as `encode_example`."""
    return encode_example(tokenizer, prompt, text).completion


def encode_example(tokenizer: Tokenizer, prompt: str, completion: str) -> TextExample:
    """The tokens of a prompt and of its completion, as they are in the tokenized whole text.

    A completion that is tokenized alone may begin with other tokens: SentencePiece puts a space before any text. EOS is
    added unless the completion already ends with it.

    Raises:
        UserError: the tokenizer has no EOS, or one token spans the end of the prompt and the beginning of the
            completion. The prompt alone, as it is used for sampling, would have other tokens than those learned.
    """
    return next(encode_examples(tokenizer, [(prompt, completion)]))


def encode_examples(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Iterator[TextExample]:
    """As `encode_example`, for pairs of a prompt and its completion, in order; equal pairs give the same object.

    Many texts are tokenized in one call. The UserError about a pair is raised where its example would come.
    """
    encoded: dict[tuple[str, str], TextExample] = {}
    for start in range(0, len(pairs), _BATCH):
        batch = pairs[start : start + _BATCH]
        texts: list[str] = []
        for prompt, completion in batch:
            if (prompt, completion) not in encoded:
                texts += [prompt, prompt + completion]
        tokens = _tokenize(tokenizer, texts)
        for prompt, completion in batch:
            example = encoded.get((prompt, completion))
            if example is None:
                example = _split(tokenizer, tokens[prompt], tokens[prompt + completion])
                encoded[prompt, completion] = example
            yield example


def _split(tokenizer: Tokenizer, before: tuple[int, ...], whole: tuple[int, ...]) -> TextExample:
    """The example whose prompt has the tokens `before`, and whose whole text has the tokens `whole`."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer of this model has no EOS token: an answer could not end")
    if whole[: len(before)] != before:
        raise UserError(_spanning_token(tokenizer, before, whole))
    after = whole[len(before) :]
    end = () if after[-1:] == (tokenizer.eos_token_id,) else (tokenizer.eos_token_id,)
    return TextExample(_with_prefix(tokenizer, before), (*after, *end))


def answer_after(prompt: str, answer: str) -> str:
    """An answer as the text that follows its prompt: with a space before it unless the prompt ends in white space."""
    return answer if not prompt or prompt[-1].isspace() else f" {answer}"


def encode_answers(pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[TextExample]:
    """Questions and answers as tokens; equal pairs are tokenized once. UserError as `encode_example`."""
    texts = [(question, answer_after(question, answer)) for question, answer in pairs]
    return list(encode_examples(tokenizer, texts))


def _tokenize(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """By text, its tokens without special tokens, from one call of the tokenizer."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    ids = tokenizer(distinct, add_special_tokens=False).input_ids
    return {text: tuple(tokens) for text, tokens in zip(distinct, ids, strict=True)}


def _with_prefix(tokenizer: Tokenizer, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens after those that the tokenizer puts before every text, such as BOS; these are not put there twice."""
    prefix, _ = added_tokens(tokenizer)
    return tokens if tokens[: len(prefix)] == prefix else (*prefix, *tokens)


def _spanning_token(tokenizer: Tokenizer, before: tuple[int, ...], whole: tuple[int, ...]) -> str:
    """The message for a token that spans the end of the prompt and the beginning of its completion.

    It is the first token of the whole text that differs from those of the prompt, `before`.
    """
    differing = (at for at, (token, other) in enumerate(zip(before, whole, strict=False)) if token != other)
    at = next(differing, len(whole))
    token = tokenizer.decode(list(whole[at : at + 1]))
    return (
        f"the prompt and its completion meet inside the token {token!r}: let the prompt end before it, and the "
        "completion begin with it (a space belongs to the beginning of the completion)"
    )


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """A tokenizer with one token per word, split at white space.

    Token 0 is the unknown word and the padding, 1 is BOS, 2 is EOS; the `words` follow in their order.
    """
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([_UNKNOWN, _BEGIN, _END, *words])}
    backend = BackendTokenizer(WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, vocabulary[_BEGIN])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=_UNKNOWN, pad_token=_UNKNOWN, bos_token=_BEGIN, eos_token=_END
    )
