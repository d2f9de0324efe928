"""Questions from a world and from real files, with what counts as correct."""

from __future__ import annotations

import json

import pytest

from poise.data.questions import load_questions
from poise.data.spec import JsonlQuestions, WorldQuestions, WorldSpec
from poise.data.worlds import make_world
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
        ({"question": "who"}, "'answer' is not a list of texts"),
        ({"question": "who", "answer": []}, "'answer' is not a list of texts"),
        ({"question": "who", "answer": "me"}, "'answer' is not a list of texts"),
        ({"answer": ["me"]}, "there is no 'question'"),
    ],
)
def test_a_bad_question_is_named(tmp_path, row, message):
    good = json.dumps({"question": "a", "answer": ["b"]})
    (tmp_path / "q.jsonl").write_text(f"{good}\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match=rf"q\.jsonl:2: .*{message}"):
        load_questions(jsonl(tmp_path))


def test_an_id_that_comes_twice_is_an_error(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"id": 1, "question": "a", "answer": ["b"]}\n' * 2)
    with pytest.raises(UserError, match="two questions have the id '1'"):
        load_questions(jsonl(tmp_path))
