"""Questions to be answered and graded, from a world or from files."""

from __future__ import annotations

import ast
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from poise.data.examples import Question
from poise.data.rows import Row, header_advice, read_rows
from poise.data.spec import CsvQuestions, JsonlQuestions, ParquetQuestions, QuestionsSpec, WorldQuestions
from poise.errors import UserError

__all__ = [
    "SUFFIXES",
    "Question",
    "QuestionFiles",
    "choose_rows",
    "load_questions",
    "read_question",
    "read_questions",
]

QuestionFiles = JsonlQuestions | CsvQuestions | ParquetQuestions

SUFFIXES: dict[str, Literal[".jsonl", ".csv", ".parquet"]] = {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet"}
"""What the files of each format are called."""


def load_questions(spec: QuestionsSpec, seed: int = 0) -> list[Question]:
    """The questions of a spec, each with another id. The questions of a world do not depend on `seed`.

    White space round an accepted answer is dropped: what a model says is read without it. A number counts as its text,
    and a row whose `id` is missing, null or blank has its file and line as id.

    Raises:
        UserError: files that are missing or hold something else, with file and line.
    """
    if isinstance(spec, WorldQuestions):
        from poise.data.worlds import make_world  # it needs torch, and a check of files does not

        return list(make_world(spec.world, seed).questions(spec.split))
    return read_questions(choose_rows(read_rows(spec.path, SUFFIXES[spec.name]), spec.limit), spec)


def read_questions(rows: Iterable[Row], spec: QuestionFiles) -> list[Question]:
    """The questions in rows. UserError as `read_question`, and where two have one id."""
    questions, seen = [], dict[str, str]()
    for row in rows:
        question = read_question(row, spec)
        if (first := seen.setdefault(question.id, row.where)) != row.where:
            raise UserError(f"{row.where}: two questions have the id {question.id!r}; the other is {first}")
        questions.append(question)
    return questions


def choose_rows(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """A shuffled choice in the order of the file: one that is sorted by subject would else be asked about one alone."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    return [rows[number] for number in sorted(order[:limit])]


def read_question(row: Row, spec: QuestionFiles) -> Question:
    """The question in a row. UserError with file and line where it has none, a blank one, or no answers."""
    for option, field in (("answers", spec.answers), ("question", spec.question)):
        if field not in row.values:
            advice = header_advice(row.values) if spec.name == "csv" else ""
            advice = advice or f"; questions.{option} names the field"
            raise UserError(f"{row.where}: {row.missing(field)}{advice}")
    value = row.values[spec.answers]
    listed = _listed(value) if spec.name == "csv" else value
    answers = [_text(answer) for answer in (listed if isinstance(listed, list) else [listed])]
    accepted = tuple(dict.fromkeys(answer.strip() for answer in answers if answer is not None and answer.strip()))
    if None in answers or not accepted:
        raise UserError(f"{row.where}: {spec.answers!r} is {_described(value)}, not an answer or a list of answers")
    for answer in accepted:
        row.check_text(answer, spec.answers)
    row.check_text(_id(row), "id")
    prompt = row.text(spec.question)
    if not prompt.strip():
        raise UserError(f"{row.where}: {spec.question!r} is {_described(prompt)}, not a question")
    return Question(_id(row), prompt, accepted)


def _text(value: Any) -> str | None:
    """An answer as text; None for what is none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return value if isinstance(value, str) else None


def _listed(cell: str) -> Any:
    """A cell of CSV that was written as a list, such as ["a", "b"]; any other text as it is."""
    if not (cell.strip().startswith("[") and cell.strip().endswith("]")):
        return cell
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the fields {', '.join(map(repr, value))}"
    return "empty" if value in (None, "", []) else f"{value!r:.80}"


def _id(row: Row) -> str:
    value = row.values.get("id")
    is_missing = value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()
    return row.id if is_missing else str(value)
