"""Texts that are too long for a model, counted in its tokens by the functions that the run counts with.

A token stands for a byte of text at least, but for the few signs that a tokenizer rewrites as several. Only where that
bound does not settle it is the tokenizer opened, for which
transformers is imported; of many rows the longest are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from poise.data.spec import JsonlText, ParquetText, WorldQuestions
from poise.errors import UserError
from poise.kinds.check_rows import rows_to_check
from poise.kinds.specs.align import AlignSelfplaySpec
from poise.kinds.specs.calibrate import CalibrateMeasureSpec
from poise.kinds.specs.finetune import FinetuneSftSpec

if TYPE_CHECKING:
    from poise.data.examples import Question
    from poise.data.rows import Row

__all__ = ["example_too_long", "prompt_too_long"]

_T = TypeVar("_T")
_COUNTED = 1000
"""Texts that are counted in tokens: the longest ones."""

_ADDED = 8
"""Tokens that a tokenizer puts round a text at most, and bytes of the mark that it puts before the first word."""


def prompt_too_long(spec: CalibrateMeasureSpec | AlignSelfplaySpec, context: int, max_tokens: int) -> str | None:
    """What the run would say of the first prompt, among the longest, after which its answers do not fit; else None.

    `context` is what the local folder of the model says. Questions that cannot be read are left to those who read them.
    """
    from poise.data.questions import SUFFIXES, choose_rows, read_questions

    if isinstance(spec.questions, WorldQuestions):
        return None
    try:
        rows = rows_to_check(spec.questions.path, SUFFIXES[spec.questions.name])
        questions = read_questions(choose_rows(rows, spec.questions.limit), spec.questions)
    except UserError:
        return None
    template = spec.prompt if isinstance(spec, CalibrateMeasureSpec) else "{question}"
    prompts = [replace(each, prompt=template.replace("{question}", each.prompt)) for each in questions]
    doubtful = [each for each in prompts if _most_tokens(each.prompt) + max_tokens > context - 1]
    return _prompt_fault(spec, _longest(doubtful, [len(each.prompt) for each in doubtful]), max_tokens)


def example_too_long(spec: FinetuneSftSpec, context: int) -> str | None:
    """What the run would say of the first text, among the longest, that it cannot learn from; else None."""
    from poise.data.rows import read_pair

    data = spec.data
    if not isinstance(data, JsonlText | ParquetText):
        return None
    most = min(data.max_tokens, context)
    try:
        rows = rows_to_check(data.path, ".jsonl" if isinstance(data, JsonlText) else ".parquet")
        pairs = [read_pair(row, data) for row in rows]
    except UserError:
        return None
    texts = [prompt if data.too_long == "cut" else prompt + completion for prompt, completion in pairs]
    doubtful = [number for number, text in enumerate(texts) if _most_tokens(text) > most]
    rows = _longest([rows[number] for number in doubtful], [len(texts[number]) for number in doubtful])
    return _example_fault(spec, data, rows)


def _prompt_fault(
    spec: CalibrateMeasureSpec | AlignSelfplaySpec, questions: Sequence[Question], max_tokens: int
) -> str | None:
    if not questions:
        return None
    from poise.data.examples import encode_prompt
    from poise.kinds.sampling import check_questions
    from poise.models.folder import read_folder
    from poise.models.language import open_tokenizer

    folder = read_folder(Path(str(spec.model.folder)).expanduser().absolute())
    tokenizer = open_tokenizer(folder.path)
    key = "decoding.max_tokens" if isinstance(spec, CalibrateMeasureSpec) else "max_tokens"
    try:
        check_questions(
            folder, ((each.id, encode_prompt(tokenizer, each.prompt)) for each in questions), max_tokens, key
        )
    except UserError as error:
        return str(error)
    return None


def _example_fault(spec: FinetuneSftSpec, data: JsonlText | ParquetText, rows: Sequence[Row]) -> str | None:
    if not rows:
        return None
    from poise.data.text import encode_rows
    from poise.models.examine import context_length
    from poise.models.folder import read_folder
    from poise.models.language import open_config, open_tokenizer
    from poise.models.limits import NO_LIMITS, ModelLimits

    folder = read_folder(Path(str(spec.model.folder)).expanduser().absolute())
    tokenizer = open_tokenizer(folder.path)
    if tokenizer.eos_token_id is None:
        return None  # the run takes it from the opened model
    context = context_length(open_config(folder.path).to_dict()) or NO_LIMITS.context
    try:
        encode_rows(rows, data, tokenizer, ModelLimits(folder.limits.vocabulary, context))
    except UserError as error:
        return str(error)
    return None


def _longest(items: Sequence[_T], lengths: Sequence[int]) -> list[_T]:
    """The longest of the items, in their order."""
    order = sorted(range(len(items)), key=lambda number: -lengths[number])
    return [items[number] for number in sorted(order[:_COUNTED])]


def _most_tokens(text: str) -> int:
    return len(text.encode(errors="replace")) + _ADDED
