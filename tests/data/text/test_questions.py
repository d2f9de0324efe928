"""Questions from a world and from real files, with what counts as correct."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from poise.data.synthetic_facts import make_world
from poise.data.text.question_spec import CsvQuestions, JsonlQuestions, ParquetQuestions, WorldQuestions
from poise.data.text.questions import load_questions
from poise.data.world_spec import WorldSpec
from poise.errors import UserError


def jsonl(path, **options) -> JsonlQuestions:
    return JsonlQuestions(name="jsonl", path=str(path), **options)


def test_the_questions_of_a_world_do_not_depend_on_the_seed_of_the_run():
    spec = WorldSpec(entities=8, relations=4)
    world = make_world(spec)
    for split in ("evaluate", "prefer"):
        questions = WorldQuestions(name="world", split=split, world=spec)
        assert load_questions(questions, 1) == load_questions(questions, 2) == list(world.questions(split))


def test_real_questions(shared_data):
    asked = load_questions(jsonl(shared_data / "qa" / "NQ-open.dev.jsonl"))
    assert (len(asked), len({question.id for question in asked})) == (3610, 3610)
    assert asked[0].prompt == "when was the last time anyone was on the moon"
    assert asked[0].answers == ("14 December 1972 UTC", "December 1972")
    assert asked[0].distribution is None
    trivia = load_questions(jsonl(shared_data / "qa" / "triviaqa_1000.jsonl", answers="golden_answers", limit=10))
    every = load_questions(jsonl(shared_data / "qa" / "triviaqa_1000.jsonl", answers="golden_answers"))
    assert [question.id for question in every][:2] == ["test_6233", "test_6654"]
    assert every[0].answers[0] == "Mark Twain"
    places = [every.index(question) for question in trivia]
    assert places == sorted(places)
    assert len(places) == 10
    assert max(places) > 500  # not the first ones
    fewer = load_questions(jsonl(shared_data / "qa" / "triviaqa_1000.jsonl", answers="golden_answers", limit=5))
    assert {question.id for question in fewer} <= {question.id for question in trivia}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "who"}, "there is no 'answer', only question; questions.answers names the field"),
        ({"question": "who", "answer": []}, "'answer' is empty, not an answer"),
        ({"question": "who", "answer": " "}, "'answer' is ' ', not an answer"),
        ({"question": "who", "answer": None}, "'answer' is empty, not an answer"),
        ({"question": "who", "answer": ["me", None]}, "not an answer or a list of answers"),
        ({"question": "who", "answer": {"value": "me"}}, "an object with the fields 'value'"),
        ({"question": "who", "answer": [["me"]]}, "not an answer or a list of answers"),
        ({"answer": ["me"]}, "there is no 'question', only answer; questions.question names the field"),
        ({"question": "", "answer": ["y"]}, "'question' is empty, not a question"),
        ({"question": " \n", "answer": ["y"]}, r"'question' is ' \\n', not a question"),
    ],
)
def test_a_bad_question_is_named(tmp_path, row, message):
    good = json.dumps({"question": "a", "answer": ["b"]})
    (tmp_path / "q.jsonl").write_text(f"{good}\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match=rf"q\.jsonl:2: .*{message}"):
        load_questions(jsonl(tmp_path))


def test_an_id_that_comes_twice_is_an_error(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"id": 1, "question": "a", "answer": ["b"]}\n' * 2)
    with pytest.raises(UserError, match=r"q\.jsonl:2: two questions have the id '1'; the other is .*q\.jsonl:1"):
        load_questions(jsonl(tmp_path))


def test_an_id_of_null_is_none(tmp_path):
    rows = ['{"id": null, "question": "a", "answer": "b"}', '{"id": null, "question": "a", "answer": "b"}',
            '{"id": "", "question": "a", "answer": "b"}', '{"id": 0, "question": "a", "answer": "b"}']  # fmt: skip
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    assert [q.id for q in load_questions(jsonl(tmp_path))] == ["q.jsonl:1", "q.jsonl:2", "q.jsonl:3", "0"]


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("Paris", ("Paris",)),
        (" Paris\n", ("Paris",)),
        (["Paris ", "Paris", "", "Lutetia"], ("Paris", "Lutetia")),
        (1969, ("1969",)),
        ([2.5, "two and a half"], ("2.5", "two and a half")),
        (True, ("true",)),
        ("[redacted]", ("[redacted]",)),
    ],
)
def test_an_answer_is_a_text_a_number_or_a_list(tmp_path, answer, accepted):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "a", "answer": answer}))
    assert load_questions(jsonl(tmp_path))[0].answers == accepted


def test_questions_from_csv_and_parquet_are_those_of_json_lines(tmp_path):
    rows = [
        {"id": "1", "question": 'who, and "why"?', "answer": ["Ann", "Bob's"]},
        {"id": "2", "question": "two\nlines", "answer": ["7"]},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    with open(tmp_path / "q.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "answer", "id"])
        writer.writeheader()
        writer.writerow({**rows[0], "answer": json.dumps(rows[0]["answer"])})
        writer.writerow({**rows[1], "answer": "7"})
    expected = load_questions(jsonl(tmp_path))
    assert load_questions(CsvQuestions(name="csv", path=str(tmp_path / "q.csv"))) == expected
    assert load_questions(ParquetQuestions(name="parquet", path=str(tmp_path))) == expected
    (tmp_path / "p.csv").write_text("question,answer\nwho,\"['Ann', 'Bob']\"\n")  # as pandas writes lists
    assert load_questions(CsvQuestions(name="csv", path=str(tmp_path / "p.csv")))[0].answers == ("Ann", "Bob")


def test_an_empty_question_of_parquet_is_named(tmp_path):
    pq.write_table(pa.table({"question": ["a", ""], "answer": ["b", "c"]}), tmp_path / "q.parquet")
    with pytest.raises(UserError, match=r"q\.parquet:2: 'question' is empty, not a question"):
        load_questions(ParquetQuestions(name="parquet", path=str(tmp_path)))


def test_parquet_numbers_are_answers(tmp_path):
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [1, 2], "id": [5, None]}), tmp_path / "q.parquet")
    found = load_questions(ParquetQuestions(name="parquet", path=str(tmp_path)))
    assert [(q.id, q.answers) for q in found] == [("5", ("1",)), ("q.parquet:2", ("2",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\nwho,me,too\n", r"q\.csv:2: 3 values for the 2 columns"),
        ("question,question\nwho,me\n", "names its columns, each once"),
        ('question,answer\nwho,"me\n', "no CSV file in UTF-8"),
        ("question;answer\nwho;me\n", "there is no 'answer', only question;answer"),
        ("question,answer\nwho,\n", "'answer' is empty"),
        ('question,answer\n"",me\n', r"q\.csv:2: 'question' is empty, not a question"),
        (
            "Is it so?,yes,no,A\nIs it not?,no,yes,B\n",
            "only A, Is it so\\?, no, yes; its first line looks like data: put a",
        ),
        ("Add 1.,0,0,B\nAdd 2.,4,1,A\n", "names its columns, each once; .*; its first line looks like data"),
        ("", "no row to read"),
    ],
)
def test_a_csv_file_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_questions(CsvQuestions(name="csv", path=str(tmp_path / "q.csv")))
    (tmp_path / "q.csv").write_bytes(b"question,answer\n\xff,b\n")
    with pytest.raises(UserError, match="no CSV file in UTF-8"):
        load_questions(CsvQuestions(name="csv", path=str(tmp_path / "q.csv")))


def test_a_real_csv_file_without_a_line_of_names(shared_data):
    path = str(shared_data / "qa" / "mmlu" / "test" / "abstract_algebra_test.csv")
    with pytest.raises(
        UserError, match=r"there is no 'answer'.* its first line looks like data: put a line of"
    ) as found:
        load_questions(CsvQuestions(name="csv", path=path))
    assert "Find the degree for the given ..." in str(found.value)
    assert "field extension" not in str(found.value)


def test_real_csv_and_real_single_answers(shared_data):
    path = str(shared_data / "qa" / "simple_qa_test_set.csv")
    asked = load_questions(CsvQuestions(name="csv", path=path, question="problem"))
    assert len(asked) == 4326
    assert asked[0].prompt == "Who received the IEEE Frank Rosenblatt Award in 2010?"
    assert asked[0].answers == ("Michio Sugeno",)
    assert all(answer == answer.strip() for question in asked for answer in question.answers)
    gsm = load_questions(jsonl(shared_data / "qa" / "gsm8k" / "test.jsonl"))
    assert (len(gsm), gsm[0].answers[0][-7:]) == (1319, "#### 18")
