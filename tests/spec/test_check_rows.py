"""Files of rows are read before a run as the run reads them: a row that it would stop at is named at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from poise.cli import cli
from poise.kinds import KINDS
from poise.kinds.check import FieldError, find_errors
from poise.kinds.check import rows as check_rows

PAIR = {"prompt": "a", "completion": " b"}
QUESTION = {"question": "who", "answer": ["me"]}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_lines(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def text_spec(path: str = "rows.jsonl") -> dict[str, Any]:
    data = {"name": "jsonl", "path": path}
    return {"kind": "finetune.sft", "name": "tuned", "model": {"folder": "s3://a/b"}, "data": data,
            "train": {"steps": 1}}  # fmt: skip


def question_spec(**options: Any) -> dict[str, Any]:
    questions = {"name": "jsonl", "path": "rows.jsonl", **options}
    return {"kind": "calibrate.measure", "name": "measured", "model": {"folder": "s3://a/b"}, "questions": questions}


def mistakes_of(values: dict[str, Any]) -> list[FieldError]:
    return find_errors(KINDS[values["kind"]].model_validate(values))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{no json\n", "rows.jsonl:6: this line is no JSON"),
        ("[1]\n", "rows.jsonl:6: this line is list, not an object"),
        ({"prompt": "a"}, "rows.jsonl:6: there is no 'completion', only prompt"),
        ({"prompt": "a", "completion": 3}, "rows.jsonl:6: 'completion' is int, not text"),
        ({"prompt": "a", "completion": " "}, "rows.jsonl:6: the completion is empty"),
        ({"prompt": "\ud800", "completion": "b"}, "rows.jsonl:6: 'prompt' has half of a surrogate pair"),
    ],
)
def test_a_later_row_that_cannot_be_learned_is_named_with_its_line(row, message):
    write_lines("rows.jsonl", [PAIR, PAIR, "\n", PAIR, PAIR, row, PAIR, row])
    (mistake,) = mistakes_of(text_spec())
    assert (mistake.path, mistake.is_note) == (("data", "path"), False)
    assert message in mistake.message
    assert "rows.jsonl:8" not in mistake.message


def test_a_later_file_of_a_folder_is_read_too():
    Path("rows").mkdir()
    write_lines("rows/a.jsonl", [PAIR])
    write_lines("rows/b.jsonl", [PAIR, {"completion": "b"}])
    (mistake,) = mistakes_of(text_spec("rows"))
    assert "rows/b.jsonl:2: there is no 'prompt'" in mistake.message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "what", "answer": []}, "rows.jsonl:3: 'answer' is empty, not an answer"),
        ({"answer": ["me"]}, "rows.jsonl:3: there is no 'question'"),
        ({**QUESTION, "id": "one"}, "rows.jsonl:3: two questions have the id 'one'; the other is"),
    ],
)
def test_a_later_question_that_cannot_be_asked_is_named_with_its_line(row, message):
    write_lines("rows.jsonl", [{**QUESTION, "id": "one"}, QUESTION, row])
    (mistake,) = mistakes_of(question_spec())
    assert message in mistake.message
    assert "set question and answers" not in mistake.message  # the fields serve: the first row has them


def test_a_question_that_is_not_asked_is_no_mistake():
    write_lines("rows.jsonl", [QUESTION] * 99 + [{"question": "what", "answer": []}])
    assert len(mistakes_of(question_spec())) == 1
    assert mistakes_of(question_spec(limit=1)) == []


def test_of_a_large_file_the_first_rows_are_read_and_counted(monkeypatch):
    """The note keeps nothing from running; a broken row among the first ones does."""
    monkeypatch.setattr(check_rows, "_WHOLE_BYTES", 200)
    write_lines("rows.jsonl", [PAIR] * 100 + ["{no json\n"])
    size = len(json.dumps(PAIR)) + 1
    (note,) = mistakes_of(text_spec())
    assert note.is_note
    assert f"the first {-(-200 // size)} rows of rows.jsonl were looked at; the run reads all" in note.message
    Path("spec.yaml").write_text(yaml.safe_dump({**text_spec(), "store": "s3://a/b"}))
    outcome = CliRunner().invoke(cli, ["check", "spec.yaml"])
    assert outcome.exit_code == 0, outcome.output
    assert "data.path: the first 6 rows of rows.jsonl were looked at" in outcome.stderr
    write_lines("rows.jsonl", [PAIR, PAIR, "{no json\n", *[PAIR] * 100])
    (mistake,) = mistakes_of(text_spec())
    assert "rows.jsonl:3: this line is no JSON" in mistake.message


def test_blank_lines_count_in_the_number_of_the_first_row():
    write_lines("rows.jsonl", ["\n", "\n", {"prompt": "a"}])
    (mistake,) = mistakes_of(text_spec())
    assert "rows.jsonl:3: there is no 'completion'" in mistake.message
