"""Questions for language models with their accepted answers, from a world or from files."""

from __future__ import annotations

import ast
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

from poise.data.text.examples import Question
from poise.data.text.question_spec import QuestionRows, QuestionsSpec, WorldQuestions
from poise.data.text.records import Row, header_advice
from poise.errors import UserError

__all__ = [
    "Question",
    "choose_rows",
    "load_questions",
    "read_question",
    "read_questions",
]


def load_questions(spec: QuestionsSpec, seed: int = 0) -> list[Question]:
    """The questions of a spec, with unique ids. The questions of a world do not depend on `seed`.

    White space around an accepted answer is removed, as it is from the responses of a model. A number is converted to
    text. A row whose `id` is missing, null or blank gets its file and line as id.

    Raises:
        UserError: files are missing or malformed; the message has file and line.
    """
    if isinstance(spec, WorldQuestions):
        from poise.data.synthetic_facts import make_world  # imports torch, which a check of files does not need

        return list(make_world(spec.world, seed).questions(spec.split))
    return read_questions(choose_rows(spec.read_rows(), spec.limit), spec)


def read_questions(rows: Iterable[Row], spec: QuestionRows) -> list[Question]:
    """The questions in rows. UserError as `read_question`, and where two rows have the same id."""
    questions = []
    places: dict[str, str] = {}  # where each id was first used
    for row in rows:
        question = read_question(row, spec)
        first = places.setdefault(question.id, row.where)
        if first != row.where:
            raise UserError(f"{row.where}: two questions have the id {question.id!r}; the other is {first}")
        questions.append(question)
    return questions


def choose_rows(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """A random subset of `limit` rows in the order of the file, the same for every seed; all when `limit` is None.

    The first `limit` rows of a file that is sorted by subject would cover few subjects.
    """
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    return [rows[number] for number in sorted(order[:limit])]


def read_question(row: Row, spec: QuestionRows) -> Question:
    """The question in a row. UserError with file and line where the question is missing or blank, or has no answer."""
    for option, field in (("answers", spec.answers), ("question", spec.question)):
        if field not in row.values:
            advice = header_advice(row.values) if spec.name == "csv" else ""
            advice = advice or f"; questions.{option} names the field"
            raise UserError(f"{row.where}: {row.missing(field)}{advice}")
    value = row.values[spec.answers]
    parsed = _parse_cell(value) if spec.name == "csv" else value
    answers = [_text(answer) for answer in (parsed if isinstance(parsed, list) else [parsed])]
    accepted = tuple(dict.fromkeys(answer.strip() for answer in answers if answer is not None and answer.strip()))
    if None in answers or not accepted:
        raise UserError(f"{row.where}: {spec.answers!r} is {_describe(value)}, not an answer or a list of answers")
    for answer in accepted:
        row.check_text(answer, spec.answers)
    row.check_text(_id(row), "id")
    prompt = row.text(spec.question)
    if not prompt.strip():
        raise UserError(f"{row.where}: {spec.question!r} is {_describe(prompt)}, not a question")
    return Question(_id(row), prompt, accepted)


def _text(value: Any) -> str | None:
    """A text, number or bool as text; None for any other value, which is no answer."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return value if isinstance(value, str) else None


def _parse_cell(cell: str) -> Any:
    """The list in a cell of CSV that holds one, such as ["a", "b"]; any other cell unchanged."""
    if not (cell.strip().startswith("[") and cell.strip().endswith("]")):
        return cell
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell


def _describe(value: Any) -> str:
    """A value for the message of an error, at most 80 characters of it."""
    if isinstance(value, dict):
        return f"an object with the fields {', '.join(map(repr, value))}"
    return "empty" if value in (None, "", []) else f"{value!r:.80}"


def _id(row: Row) -> str:
    """The `id` of a row, else its file and line. Parquet has NaN for a missing number."""
    value = row.values.get("id")
    is_missing = value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()
    return row.id if is_missing else str(value)
