"""Questions to be answered and graded, from a world or from files."""

from __future__ import annotations

from typing import Any

from poise.data.examples import Question
from poise.data.rows import Row, read_rows
from poise.data.spec import JsonlQuestions, QuestionsSpec
from poise.data.worlds import make_world
from poise.errors import UserError

__all__ = ["Question", "load_questions"]


def load_questions(spec: QuestionsSpec, seed: int = 0) -> list[Question]:
    """The questions of a spec, each with another id. The questions of a world do not depend on `seed`.

    Raises:
        UserError: files that are missing or hold something else, with file and line.
    """
    if not isinstance(spec, JsonlQuestions):
        return list(make_world(spec.world, seed).questions(spec.split))
    questions = [_question(row, spec) for row in read_rows(spec.path, ".jsonl", spec.limit)]
    seen: dict[str, int] = {}
    for number, question in enumerate(questions):
        if seen.setdefault(question.id, number) != number:
            raise UserError(f"{spec.path}: two questions have the id {question.id!r}")
    return questions


def _question(row: Row, spec: JsonlQuestions) -> Question:
    answers: Any = row.values.get(spec.answers)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{row.where}: {spec.answers!r} is not a list of texts with an answer in it")
    return Question(str(row.values.get("id", row.id)), row.text(spec.question), tuple(answers))
