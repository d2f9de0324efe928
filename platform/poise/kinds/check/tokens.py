"""Checks of lengths in tokens: prompts and training texts that are too long for a model.

A token stands for at least one byte of text, except for a few characters that a tokenizer rewrites as several. So the
bytes of a text bound its tokens from above. Only where that bound does not settle it is the tokenizer opened, which
imports transformers, and the longest texts are counted by the functions that the run counts with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from poise.data.text.question_spec import FunctionQuestions, WorldQuestions
from poise.data.text.spec import JsonlText, ParquetText
from poise.errors import UserError
from poise.kinds.align_selfplay.spec import AlignSelfplaySpec
from poise.kinds.calibrate_measure.spec import CalibrateMeasureSpec
from poise.kinds.check.field_error import FieldError
from poise.kinds.check.rows import rows_to_check
from poise.kinds.finetune_sft.spec import FinetuneSftSpec
from poise.models.spec import LanguageModelSpec

if TYPE_CHECKING:
    from poise.data.text.examples import Question
    from poise.data.text.records import Row

__all__ = ["prompt_errors", "text_length_errors"]

_T = TypeVar("_T")
_COUNTED = 1000
"""The number of texts whose tokens are counted: the longest ones."""

_ADDED = 8
"""Upper bound of the tokens that a tokenizer adds round a text, and of the bytes of the mark before the first word."""


def prompt_errors(spec: CalibrateMeasureSpec | AlignSelfplaySpec) -> Iterator[FieldError]:
    """Answers that do not fit into the context of the model: after any prompt, or after the prompts of the spec."""
    context = _context_length(spec.model)
    if context is None:
        return
    if isinstance(spec, CalibrateMeasureSpec):
        key = "decoding.max_tokens"
        max_tokens = spec.decoding.max_tokens
    else:
        key = "max_tokens"
        max_tokens = spec.max_tokens
    most = context - 2  # a prompt has at least one token, and vLLM scores by generating one more
    if max_tokens > most:
        message = f"{max_tokens} tokens are more than the model in {spec.model.folder} can hold after a prompt, {most}"
        yield FieldError(tuple(key.split(".")), f"{message}: lower it")
    elif reason := _prompt_too_long(spec, context, max_tokens):
        yield FieldError(tuple(key.split(".")), reason)


def text_length_errors(spec: FinetuneSftSpec) -> Iterator[FieldError]:
    """Training texts that are longer than the model can hold or the spec allows."""
    context = _context_length(spec.model)
    if context is None:
        return
    message = _example_too_long(spec, context)
    if message:
        yield FieldError(("data", "path"), message)


def _context_length(spec: LanguageModelSpec) -> int | None:
    """The longest sequence of the model in a local folder, in tokens; None where it is not known."""
    if spec.folder is None or "://" in spec.folder:
        return None
    from poise.models.examine import examine_folder

    try:
        return examine_folder(spec.folder).context
    except UserError:
        return None  # reported by folder_errors


def _prompt_too_long(spec: CalibrateMeasureSpec | AlignSelfplaySpec, context: int, max_tokens: int) -> str | None:
    """The message of the run about the first prompt that leaves no room for its answers; None where all fit.

    `context` is the longest sequence of the model. Questions that cannot be read are reported by `question_errors`.
    """
    from poise.data.text.questions import choose_rows, read_questions

    if isinstance(spec.questions, WorldQuestions | FunctionQuestions):
        return None
    try:
        rows = rows_to_check(spec.questions.path, spec.questions.suffix)
        questions = read_questions(choose_rows(rows, spec.questions.limit), spec.questions)
    except UserError:
        return None
    template = spec.prompt if isinstance(spec, CalibrateMeasureSpec) else "{question}"
    prompts = [replace(question, prompt=template.replace("{question}", question.prompt)) for question in questions]
    candidates = [prompt for prompt in prompts if _most_tokens(prompt.prompt) + max_tokens > context - 1]
    lengths = [len(prompt.prompt) for prompt in candidates]
    return _check_prompts(spec, _longest(candidates, lengths), max_tokens)


def _check_prompts(
    spec: CalibrateMeasureSpec | AlignSelfplaySpec, questions: Sequence[Question], max_tokens: int
) -> str | None:
    """Count the tokens of prompts as the run does; the message of its error, or None."""
    if not questions:
        return None
    from poise.data.text.examples import encode_prompts
    from poise.inference.shards import check_questions
    from poise.models.language import open_tokenizer
    from poise.models.model_folder import read_folder

    folder = read_folder(Path(str(spec.model.folder)).expanduser().absolute())
    tokenizer = open_tokenizer(folder.path)
    key = "decoding.max_tokens" if isinstance(spec, CalibrateMeasureSpec) else "max_tokens"
    prompts = encode_prompts(tokenizer, [question.prompt for question in questions])
    ids = [question.id for question in questions]
    try:
        check_questions(folder, zip(ids, prompts, strict=True), max_tokens, key)
    except UserError as error:
        return str(error)
    return None


def _example_too_long(spec: FinetuneSftSpec, context: int) -> str | None:
    """The message of the run about the first training text that is too long; None where all fit."""
    from poise.data.text.records import read_pair

    data = spec.data
    if not isinstance(data, JsonlText | ParquetText):
        return None
    most = min(data.max_tokens, context)
    try:
        rows = rows_to_check(data.path, data.suffix)
        pairs = [read_pair(row, data) for row in rows]
    except UserError:
        return None
    texts = [prompt if data.too_long == "cut" else prompt + completion for prompt, completion in pairs]
    candidates = [number for number, text in enumerate(texts) if _most_tokens(text) > most]
    lengths = [len(texts[number]) for number in candidates]
    return _check_examples(spec, data, _longest([rows[number] for number in candidates], lengths))


def _check_examples(spec: FinetuneSftSpec, data: JsonlText | ParquetText, rows: Sequence[Row]) -> str | None:
    """Encode rows as the run does; the message of its error, or None."""
    if not rows:
        return None
    from poise.data.text.batches import encode_rows
    from poise.models.examine import context_length
    from poise.models.language import open_config, open_tokenizer
    from poise.models.limits import NO_LIMITS, ModelLimits
    from poise.models.model_folder import read_folder

    folder = read_folder(Path(str(spec.model.folder)).expanduser().absolute())
    tokenizer = open_tokenizer(folder.path)
    if tokenizer.eos_token_id is None:
        return None  # the run takes the EOS token from the opened model
    context = context_length(open_config(folder.path).to_dict()) or NO_LIMITS.context
    try:
        encode_rows(rows, data, tokenizer, ModelLimits(folder.limits.vocabulary, context))
    except UserError as error:
        return str(error)
    return None


def _longest(items: Sequence[_T], lengths: Sequence[int]) -> list[_T]:
    """The longest of the items, in their original order."""
    order = sorted(range(len(items)), key=lambda number: -lengths[number])
    return [items[number] for number in sorted(order[:_COUNTED])]


def _most_tokens(text: str) -> int:
    """Upper bound of the number of tokens of a text."""
    return len(text.encode(errors="replace")) + _ADDED
