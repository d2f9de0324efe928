"""From a response to a grade: extraction, classes of equal meaning, aliases."""

from __future__ import annotations

import csv
import json
import re
import time
import unicodedata

import pytest

from poise.calibrate.clustering import CLUSTERERS, ExactMatch
from poise.calibrate.extract import EMPTY, NO_ANSWER, extract
from poise.calibrate.grade import matches_alias
from poise.calibrate.normalize import normalised


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: Paris", "Paris"),
        ("Thinking.\nAnswer: Lyon\nNo.\nanswer : Paris\nConfidence: 90%", "Paris"),
        ("The final answer: Paris \n confidence: 5", "Paris"),
        ("Answer: Paris\nBecause it is the capital.", "Paris"),
        ("Answer: Paris\r\nBecause it is.", "Paris"),
        ("Answer:\n\nParis\nBecause it is.", "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("**Answer: Paris**\n", "Paris"),
        ("Answer: **Paris**, Confidence: 90%", "Paris"),
        ("Answer: `a_b_c`", "a_b_c"),
        ("**Answer**: C*", "C*"),
        ("Answer: Paris\n**Confidence:** 90%", "Paris"),
        ("Answer: Paris (confidence: 90%)", "Paris"),
        ("Answer: public confidence", "public confidence"),
        ("Answer: Paris\n\nQuestion: Who?\nAnswer: Berlin\nQuestion: When?\nAnswer: 1999", "Paris"),
        ("Answer: Paris\nQ2: Who?\nAnswer: Berlin", "Paris"),
        ("Question: where?\nAnswer: Paris", "Paris"),
        ("Unanswered: none", NO_ANSWER),
        ("Answer: \u200b", EMPTY),
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
    assert extract("Answer: Paris\nBecau", finished=False, rule="line") == "Paris"
    assert extract("Answer: Paris, confidence: 9", finished=False, rule="line") == "Paris"
    assert extract("Answer: Par", finished=False, rule="line") == NO_ANSWER
    assert extract("Answer: Lyon\nNo. Answer:", finished=False, rule="line") == NO_ANSWER
    assert extract("Answer: Lyon\nNo. Answer:\n", finished=False, rule="line") == NO_ANSWER
    assert extract("Par", finished=False, rule="whole") == NO_ANSWER
    assert extract(" Paris\n", finished=True, rule="whole") == "Paris"
    assert extract(" \n", finished=True, rule="whole") == EMPTY
    assert extract("\ufeff\u200b", finished=True, rule="whole") == EMPTY
    with pytest.raises(ValueError, match="'line' or 'whole'"):
        extract("Paris", finished=True, rule="lines")


@pytest.mark.parametrize(
    "unit", ["\n", " ", "answer", "answer:", "\nAnswer: a", "*", "*a ", "confidence", ".", "5 ", "$", "-", "\u200b"]
)
def test_time_is_linear_in_the_length_of_a_response(unit):
    """A quadratic rule takes an hour for this."""
    text = unit * (100_000 // len(unit))
    started = time.process_time()
    extract(text, finished=True, rule="line")
    extract(f"Answer: {text}", finished=False, rule="line")
    normalised(text)
    assert time.process_time() - started < 4


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
    ("\u00bd", "1/2"),
    ("1\u00bd", "1 1/2"),
    ("1 / 2", "1/2"),
    ("Par\u200bis", "Paris"),
    ("\ufeffAlgeria\u200e", "Algeria"),
    ("soft\u00adware", "software"),
    ("stra\u00dfe", "STRASSE"),
    ("\ufb01re", "fire"),
    ("10\u00b2", "10^2"),
    ("10\u207b\u00b3", "10^-3"),
    ("\u33a1", "m\u00b2"),
    ("H\u2082O", "H2O"),
    ("5\u1d57\u02b0", "5th"),
    ("\u0663", "3"),
    ("1723 -1792", "1723\u20131792"),
    ("1723 - 1792", "1723-1792"),
    ("$ 5", "$5"),
    ("$2.50", "$2.5"),
    ("$x = 5$", "x=5"),
    ("50 %", "50%"),
    ("1'000'000", "1000000"),
    ("+5", "5"),
    ("5\u203211\u2033", "5'11\""),
    ("Simon & Garfunkel", "Simon and Garfunkel"),
    ("R&B", "R & B"),
    ("Sony\u2122", "Sony"),
    ("Paris,France", "Paris, France"),
    ("Kinks, The", "The Kinks"),
    ("The 9", "9"),
    ("AC/DC", "ACDC"),
    ("COVID-19", "covid19"),
    ("**Paris**", "Paris"),
    ("54\u00a0Mbit/s", "54 Mbit/s"),
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
    ("10\u00b2", "102"),
    ("10\u00b2", "10"),
    ("10\u207b\u00b3", "10\u00b3"),
    ("1/2", "12"),
    ("1\u00bd", "11/2"),
    ("2^10", "210"),
    ("2**3", "23"),
    ("10-12", "1012"),
    ("1,5", "15"),
    ("10:30", "1030"),
    ("5'11", "511"),
    ("9/11", "911"),
    ("1.2.3", "123"),
    ("log\u20828", "log28"),
    ("C++", "C#"),
    ("C++", "C"),
    ("C#", "C"),
    ("A+", "A"),
    ("$5", "\u00a35"),
    ("$5", "5"),
    ("-$5", "$5"),
    ("$5 and $6", "5 and 6"),
    ("5%", "5"),
    ("100\u00b0", "100"),
    ("x < 5", "x > 5"),
    ("Python 3.10", "Python 3.1"),
    ("Hepatitis A", "Hepatitis"),
    ("A, B", "B"),
    ("3(4)", "34"),
    ("a@b.com", "abcom"),
    ("\u0915\u093f", "\u0915\u0940"),
]


@pytest.mark.parametrize(("left", "right"), ALIKE)
def test_alike(left, right):
    assert normalised(left) == normalised(right)


@pytest.mark.parametrize(("left", "right"), APART)
def test_apart(left, right):
    assert normalised(left) != normalised(right)


def test_classes_are_numbered_by_first_occurrence_and_labelled_by_their_first_answer():
    found = ExactMatch().cluster("who?", ["Bob", "the Ann", EMPTY, "bob.", "Ann", "Ann"])
    assert found.assign == (0, 1, 2, 0, 1, 1)
    assert found.labels == ("Bob", "the Ann", EMPTY)
    assert found.counts == (2, 3, 1)
    assert ExactMatch().cluster("who?", []).counts == ()
    assert ExactMatch().cluster("who?", ["marker <EMPTY>", EMPTY]).counts == (1, 1)


def test_one_text_is_no_list_of_answers():
    """Its letters would be: "a" would be a right answer where "abc" is."""
    with pytest.raises(TypeError, match="a list of texts"):
        ExactMatch().cluster("who?", "Ann")
    with pytest.raises(TypeError, match="a list of texts"):
        matches_alias("a", "abc")


def test_marks_that_nobody_sees_change_no_grade_of_real_questions(shared_data):
    rows = map(json.loads, (shared_data / "qa" / "triviaqa_1000.jsonl").read_text().splitlines())
    answers = [row["golden_answers"] for row in rows]
    marked = [alias for aliases in answers for alias in aliases if any(unicodedata.category(c) == "Cf" for c in alias)]
    assert marked, "no alias holds such a mark"
    for alias in marked:
        plain = "".join(c for c in alias if unicodedata.category(c) != "Cf")
        assert matches_alias(plain, [alias])
        assert ExactMatch().cluster("", [plain, alias, f"\u200e{alias}\ufeff"]).counts == (3,)


def test_real_answers_that_differ_in_a_number_are_never_merged(shared_data):
    """Of all answers of three data sets: what is alike has the same digits, apart from thousands and trailing zeros."""
    with open(shared_data / "qa" / "simple_qa_test_set.csv", newline="") as file:
        answers = {row["answer"] for row in csv.DictReader(file)}
    for name, key in (("NQ-open.dev.jsonl", "answer"), ("triviaqa_1000.jsonl", "golden_answers")):
        for line in (shared_data / "qa" / name).read_text().splitlines():
            answers.update(json.loads(line)[key])
    groups: dict[str, set[str]] = {}
    for answer in sorted(answers):
        groups.setdefault(normalised(answer), set()).add(answer)
    assert len(groups) < len(answers)
    for members in groups.values():
        numbers = {
            tuple(float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)) for text in members
        }
        assert len(numbers) == 1, members


def test_a_grade_is_equality_with_an_alias_never_part_of_one():
    assert matches_alias("The Beatles.", ["Queen", "beatles"])
    assert not matches_alias("INCORRECT", ["CORRECT"])
    assert not matches_alias("York", ["New York"])
    assert not matches_alias("Paris or Lyon", ["Paris"])
    assert not matches_alias(EMPTY, [EMPTY])
    assert not matches_alias("Paris", [])


def test_every_clusterer_has_the_name_under_which_it_is_registered():
    assert [clusterer.model_fields["name"].default for clusterer in CLUSTERERS.values()] == list(CLUSTERERS)
