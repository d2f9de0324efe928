"""The matrix oracle: what it says of listed and of other texts, and that it says the opposite of the opposite."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from poise.align.games import nash_equilibrium
from poise.align.oracles import ORACLES, UNLISTED, Cyclic, MatrixOracle, with_other_answer

CYCLIC = Cyclic().rows
ANSWERS = {"capital ?": ("Arve", "Bryn", "Cole"), "river ?": ("Cole", "Dunn", "Arve")}


def test_every_pair_is_antisymmetric_and_listed_ones_are_the_matrix():
    oracle = Cyclic().build(ANSWERS)
    texts = ["Arve", "Bryn", "Cole", "Dunn", ""]
    for prompt, answers in ANSWERS.items():
        left, right = zip(*itertools.product(texts, texts), strict=True)
        said = oracle.compare([prompt] * 25, left, right).reshape(5, 5).numpy()
        assert np.allclose(said + said.T, 1, rtol=0, atol=1e-12)
        places = [texts.index(answer) for answer in answers]
        assert (said[np.ix_(places, places)] == np.array(CYCLIC)).all()
        others = [place for place in range(5) if place not in places]
        assert (said[np.ix_(others, places)] == UNLISTED).all()
        assert (said[np.ix_(others, others)] == 0.5).all()


def test_an_unlisted_text_is_no_part_of_an_equilibrium():
    assert nash_equilibrium(with_other_answer(CYCLIC)) == pytest.approx([1 / 3, 2 / 9, 4 / 9, 0], abs=1e-9)


def test_a_prompt_with_the_wrong_number_of_answers_is_refused():
    with pytest.raises(ValueError, match="'x' has 2 different answers and the game is one of 3"):
        MatrixOracle(CYCLIC, {"x": ("a", "b", "a")})


def test_a_matrix_that_is_not_antisymmetric_is_refused():
    with pytest.raises(ValueError, match="preference matrix"):
        MatrixOracle([[0.5, 0.9], [0.2, 0.5]], {"x": ("a", "b")})


def test_one_text_is_no_list_of_answers():
    with pytest.raises(ValueError, match="a list of texts"):
        MatrixOracle(CYCLIC, {"x": "abc"})


def test_every_oracle_has_the_name_under_which_it_is_registered():
    assert [oracle.model_fields["name"].default for oracle in ORACLES.values()] == list(ORACLES)
