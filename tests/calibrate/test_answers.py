"""From a response to a grade: extraction, classes of equal meaning, aliases."""

from __future__ import annotations

import pytest

from poise.calibrate.cluster import exact, normalised
from poise.calibrate.extract import EMPTY, NO_ANSWER, extract
from poise.calibrate.grade import matches_alias


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: Paris", "Paris"),
        ("Thinking.\nAnswer: Lyon\nNo.\nanswer : Paris\nConfidence: 90%", "Paris"),
        ("The final answer: Paris \n confidence: 5", "Paris"),
        ("Answer: two\nlines", "two\nlines"),
        ("Answer:", EMPTY),
        ("Answer: \nConfidence: 1", EMPTY),
        ("Paris", NO_ANSWER),
        ("", NO_ANSWER),
    ],
)
def test_the_last_answer_line_counts(response, answer):
    assert extract(response, finished=True, rule="line") == answer


def test_a_response_that_was_cut_has_no_answer_unless_it_gave_one():
    assert extract("so I think of Par", finished=False, rule="line") == NO_ANSWER
    assert extract("Answer: Paris\nConfidence: 9", finished=False, rule="line") == "Paris"
    assert extract("Par", finished=False, rule="whole") == NO_ANSWER
    assert extract(" Paris\n", finished=True, rule="whole") == "Paris"
    assert extract(" \n", finished=True, rule="whole") == EMPTY


ALIKE = [
    ("The  Beatles", "beatles!"),
    ("U.S.", "us"),
    ("\uff30aris", "paris"),
    ("1,000,000", "1000000"),
    ("3.0", "3"),
    ("2.50", "2.5"),
    (".5", "0.5"),
    ("\u22125", "-5"),
    ("\u201cOdessa\u201d", "Odessa"),
    ("well-known", "wellknown"),
]
APART = [
    ("3.5", "35"),
    ("5", "-5"),
    ("1869", "1865"),
    ("A", "The"),
    ("?", "!"),
    ("New York", "York"),
    ("100", "1"),
    (EMPTY, "empty"),
    (NO_ANSWER, "noanswer"),
    ("1,00", "1"),
    ("\u0915\u093f", "\u0915\u0940"),
]


@pytest.mark.parametrize(("left", "right"), ALIKE)
def test_alike(left, right):
    assert normalised(left) == normalised(right)


@pytest.mark.parametrize(("left", "right"), APART)
def test_apart(left, right):
    assert normalised(left) != normalised(right)


def test_classes_are_numbered_by_first_occurrence_and_labelled_by_their_first_answer():
    found = exact("who?", ["Bob", "the Ann", EMPTY, "bob.", "Ann", "Ann"])
    assert found.assign == (0, 1, 2, 0, 1, 1)
    assert found.labels == ("Bob", "the Ann", EMPTY)
    assert found.counts == (2, 3, 1)
    assert exact("who?", []).counts == ()


def test_a_grade_is_equality_with_an_alias_never_part_of_one():
    assert matches_alias("The Beatles.", ["Queen", "beatles"])
    assert not matches_alias("INCORRECT", ["CORRECT"])
    assert not matches_alias("York", ["New York"])
    assert not matches_alias("Paris or Lyon", ["Paris"])
    assert not matches_alias(EMPTY, [EMPTY])
    assert not matches_alias("Paris", [])
