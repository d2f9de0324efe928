"""Questions to be answered and graded, from a world or from files."""

from __future__ import annotations

import random
from typing import Any

from poise.data.examples import Question
from poise.data.rows import Row, read_rows
from poise.data.spec import JsonlQuestions, QuestionsSpec
from poise.errors import UserError

__all__ = ["Question", "load_questions", "read_question"]


def load_questions(spec: QuestionsSpec, seed: int = 0) -> list[Question]:
    """The questions of a spec, each with another id. The questions of a world do not depend on `seed`.

    Raises:
        UserError: files that are missing or hold something else, with file and line.
    """
    if not isinstance(spec, JsonlQuestions):
        from poise.data.worlds import make_world  # it needs torch, and a check of files does not

        return list(make_world(spec.world, seed).questions(spec.split))
    rows = _chosen(read_rows(spec.path, ".jsonl"), spec.limit)
    questions = [read_question(row, spec) for row in rows]
    seen: dict[str, int] = {}
    for number, question in enumerate(questions):
        if seen.setdefault(question.id, number) != number:
            raise UserError(f"{spec.path}: two questions have the id {question.id!r}")
    return questions


def _chosen(rows: list[Row], limit: int | None) -> list[Row]:
    """A shuffled choice in the order of the file: one that is sorted by subject would else be asked about one alone."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    return [rows[number] for number in sorted(order[:limit])]


def read_question(row: Row, spec: JsonlQuestions) -> Question:
    """The question in a row. UserError with file and line where it has none, or no answers."""
    answers: Any = row.values.get(spec.answers)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{row.where}: {spec.answers!r} is not a list of texts with an answer in it")
    for text in (*answers, str(row.values.get("id", ""))):
        row.check_text(text, spec.answers if text in answers else "id")
    return Question(str(row.values.get("id", row.id)), row.text(spec.question), tuple(answers))
