"""Games against closed forms, published rates, and the ways in which the methods are known to be got wrong."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.special import softmax

from poise.align import games
from poise.align.games import (
    exploitability,
    magnetic_mirror_descent,
    mirror_step,
    mpo,
    nash_equilibrium,
    nash_rs,
    regularised_nash,
)

W = np.array([[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]])
NASH = np.array([3, 2, 4]) / 9
MAGNET, REF = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.3, 0.2])


def divergence(p, q):
    return float((p * np.log(p / q)).sum())


def random_game(n, seed):
    upper = np.triu(np.random.default_rng(seed).uniform(size=(n, n)), 1)
    return upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(n)


def test_the_linear_program_finds_the_equilibrium():
    assert nash_equilibrium(W) == pytest.approx(NASH, abs=1e-12)
    assert nash_equilibrium([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]) == pytest.approx([1 / 3] * 3, abs=1e-12)
    assert exploitability(W, NASH) == pytest.approx(0, abs=1e-15)
    assert exploitability(W, REF) == pytest.approx(max(W @ REF) - 0.5)


def tied_game(n, seed):
    """Preferences of few values, ties among them: most such games have many equilibria."""
    upper = np.triu(np.random.default_rng(seed).choice([0, 0.25, 0.5, 0.5, 0.5, 0.75, 1], size=(n, n)), 1)
    return upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(n)


def vertices(game, seed, count=15):
    """Equilibria that are the best for random aims, by a linear program of their own."""
    n, draw = len(game), np.random.default_rng(seed)
    found = [
        linprog(aim, A_ub=-(game - 0.5).T, b_ub=np.full(n, 1e-12), A_eq=np.ones((1, n)), b_eq=[1]).x
        for aim in draw.normal(size=(count, n))
    ]
    return np.array(found)


def entropy(p):
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


@pytest.mark.parametrize("seed", range(15))
def test_of_many_equilibria_the_one_of_largest_entropy_is_taken(seed):
    game = tied_game(3 + seed % 5, seed)
    p, others = nash_equilibrium(game), vertices(game, seed)
    assert abs(exploitability(game, p)) < 1e-9
    mixed = np.random.default_rng(seed).dirichlet(np.full(len(others), 0.1), size=400) @ others
    assert max(map(entropy, [*others, *mixed])) <= entropy(p) + 1e-6
    # no step towards another equilibrium raises the entropy
    assert max(entropy(0.999 * p + 0.001 * other) for other in (*others, *mixed)) <= entropy(p) + 1e-9


def test_enough_of_these_games_have_many_equilibria():
    assert sum(np.ptp(vertices(tied_game(3 + s % 5, s), s), axis=0).max() > 0.1 for s in range(15)) >= 6


@pytest.mark.parametrize(
    ("game", "expected"),
    [
        (np.full((4, 4), 0.5), [1 / 4] * 4),  # nothing but ties
        ([[0.5, 0.5, 0.9], [0.5, 0.5, 0.6], [0.1, 0.4, 0.5]], [1 / 2, 1 / 2, 0]),  # two winners that tie
        (W[np.ix_([0, 0, 1, 2], [0, 0, 1, 2])], [1 / 6, 1 / 6, 2 / 9, 4 / 9]),  # a clone shares evenly
        (W[np.ix_([2, 0, 1, 0, 2, 2], [2, 0, 1, 0, 2, 2])], [4 / 27, 1 / 6, 2 / 9, 1 / 6, 4 / 27, 4 / 27]),
    ],
)
def test_equilibria_with_a_closed_form(game, expected):
    assert nash_equilibrium(game) == pytest.approx(expected, abs=1e-9)


def test_it_is_where_the_regularised_equilibria_go():
    game = tied_game(5, 8)
    goal = nash_equilibrium(game)
    far, near = (np.abs(regularised_nash(game, [0.2] * 5, tau) - goal).max() for tau in (0.02, 0.005))
    assert near < 0.5 * far
    assert near < 0.06


@pytest.mark.parametrize("seed", range(10))
def test_an_equilibrium_of_any_game_cannot_be_exploited(seed):
    game = random_game(2 + seed, seed)
    p = nash_equilibrium(game)
    assert p.sum() == pytest.approx(1)
    assert (p >= 0).all()
    assert abs(exploitability(game, p)) < 1e-9


def test_a_cycle_of_three_has_the_closed_form():
    for seed in range(5):
        a, b, c = np.random.default_rng(seed).uniform(0.01, 0.49, size=3)
        cycle = [[0.5, 0.5 + a, 0.5 - c], [0.5 - a, 0.5, 0.5 + b], [0.5 + c, 0.5 - b, 0.5]]
        assert nash_equilibrium(cycle) == pytest.approx(np.array([b, c, a]) / (a + b + c), abs=1e-9)


def test_multiplicative_weights_circle_and_only_their_average_converges():
    p, total = REF, np.zeros(3)
    for _ in range(5000):
        p = p * np.exp(0.1 * W @ p)
        p /= p.sum()
        total += p
    assert exploitability(W, p) == pytest.approx(0.162, abs=5e-4)
    assert exploitability(W, total / 5000) == pytest.approx(0.0013, abs=5e-5)


def test_mirror_descent_approaches_the_regularised_equilibrium_at_the_proven_rate():
    goal = regularised_nash(W, MAGNET, 0.1)
    assert goal == pytest.approx([0.591386, 0.092861, 0.315753], abs=1e-6)
    assert exploitability(W, goal) == pytest.approx(0.0904, abs=5e-5)
    p, distances = REF, [divergence(goal, REF)]
    for _ in range(300):
        p = magnetic_mirror_descent(W, MAGNET, alpha=0.1, eta=0.2, steps=1, start=p)
        distances.append(divergence(goal, p))
    ratios = np.array(distances[1:200]) / distances[:199]
    assert (ratios <= 1 / (1 + 0.2 * 0.1) + 1e-9).all()
    spread = np.diag(goal) - np.outer(goal, goal)
    linearised = (np.eye(3) + 0.2 * W @ spread) / (1 + 0.2 * 0.1)
    asymptotic = max(abs(np.linalg.eigvals(linearised - linearised.mean(0)))) ** 2
    assert (distances[300] / distances[150]) ** (1 / 150) == pytest.approx(asymptotic, abs=3e-4)


def test_a_mirror_step_is_the_argmax_that_it_claims_to_be():
    gain = W @ REF

    def value(q):
        return q @ gain - 0.3 * divergence(q, MAGNET) - divergence(q, REF) / 0.5

    best = mirror_step(REF, gain, MAGNET, 0.3, 0.5)
    rivals = np.random.default_rng(0).dirichlet(50 * best, size=1000)
    assert max(map(value, rivals)) <= value(best)


@pytest.mark.parametrize(
    ("period", "magnets", "expected"),
    [(50, 1, 0.098), (50, 20, 0.029), (50, 50, 5e-4), (50, 200, 1.3e-12), (10, 2000, 0.0)],
)
def test_mpo_reaches_the_equilibrium_of_the_game_itself(period, magnets, expected):
    policy = mpo(W, MAGNET, alpha=0.3, eta=0.5, period=period, magnets=magnets)
    assert exploitability(W, policy) == pytest.approx(expected, rel=0.05, abs=1e-14)


def test_mpo_with_a_magnet_that_is_always_the_policy_diverges():
    assert exploitability(W, mpo(W, MAGNET, alpha=0.3, eta=0.5, period=1, magnets=2000)) == pytest.approx(
        0.258, abs=5e-4
    )
    assert exploitability(W, mpo(W, MAGNET, alpha=0.3, eta=0.5, period=2, magnets=2500)) > 0.3


@pytest.mark.parametrize(("magnets", "expected"), [(50, 0.388), (400, 0.300)])
def test_mpo_against_the_magnet_instead_of_the_policy_circles(magnets, expected):
    p = MAGNET
    for _ in range(magnets):
        magnet = p
        for _ in range(50):
            p = mirror_step(p, W @ magnet, magnet, 0.3, 0.5)
    assert exploitability(W, p) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("alpha", "expected"), [(0.3, 1.6e-4), (1.0, 0.074)])
def test_the_exact_proximal_point_of_sixty_magnets(alpha, expected):
    p = MAGNET
    for _ in range(60):
        p = regularised_nash(W, p, alpha)
    assert exploitability(W, p) == pytest.approx(expected, rel=0.02)


def test_nash_rs_ends_where_policy_and_opponents_are_the_regularised_equilibrium():
    policy = nash_rs(W, REF, 0.5)
    assert policy == pytest.approx([0.55518, 0.22309, 0.22173], abs=5e-6)
    assert policy == pytest.approx(regularised_nash(W, REF, 0.5), abs=1e-13)
    assert policy == pytest.approx(games.accepted(W, policy, REF, 0.5), abs=1e-13)


@pytest.mark.parametrize(("tau", "bound"), [(0.1, 0.8333), (0.5, 0.5)])
def test_mirror_prox_contracts_at_the_rate_that_is_claimed(tau, bound):
    """The oracle of the paper's rate: margins up to 1, so that L = 1/2 and each step gains 1 / (1 + 2 tau)."""
    margins = np.array([[0, 0.6, -0.4], [-0.6, 0, 0.2], [0.4, -0.2, 0]])
    game, goal = 0.5 + margins / 2, {0.1: [0.397525, 0.164448, 0.438027], 0.5: [0.529007, 0.232042, 0.238951]}[tau]
    exact = regularised_nash(game, REF, tau)
    assert exact == pytest.approx(goal, abs=2e-6)
    p, step = np.array([0.01, 0.01, 0.98]), 2.0
    for _ in range(30):
        opponent = mirror_step(p, game @ p, REF, tau, step)
        after = mirror_step(p, game @ opponent, REF, tau, step)
        assert divergence(exact, after) <= bound * divergence(exact, p) + 1e-14
        p = after


def three_candidates(folder):
    """A close three-way race of a real election: shares of voters who rank one above the other, unranked as ties."""
    lines = (folder / "social_choice" / "nswla" / "00058-00000265.soi").read_text().splitlines()
    votes = [line.split(":") for line in lines if not line.startswith("#")]
    n, total = 8, sum(int(count) for count, _ in votes)
    wins = np.zeros((n, n))
    for count, order in votes:
        ranked = [int(place) - 1 for place in order.split(",")]
        for place, better in enumerate(ranked):
            worse = ranked[place + 1 :] + [c for c in range(n) if c not in ranked]
            wins[better, worse] += int(count)
    game = 0.5 + (wins - wins.T) / (2 * total)
    races = [game[np.ix_(three, three)] for three in itertools.combinations(range(n), 3)]
    return min(races, key=lambda race: abs(np.abs(race - 0.5).max() - 0.0134))


@pytest.mark.parametrize("tau", [0.01, 0.001])
def test_small_tau_is_solved_fast_on_a_real_election(shared_data, tau):
    game, uniform = three_candidates(shared_data), np.full(3, 1 / 3)
    assert 0.005 < np.abs(game - 0.5).max() < 0.03
    started = time.process_time()
    p, q = regularised_nash(game, uniform, tau), nash_rs(game, uniform, tau)
    assert time.process_time() - started < 2
    weights = np.exp(game @ p / tau)
    assert p == pytest.approx(weights / weights.sum(), abs=1e-10)
    assert q == pytest.approx(p, abs=1e-9)


def test_small_tau_is_solved_in_a_large_game_too():
    started = time.process_time()
    p = regularised_nash(W, REF, 0.002)
    assert time.process_time() - started < 2
    logits = np.log(REF) + W @ p / 0.002
    assert p == pytest.approx(softmax(logits), abs=1e-10)


def test_the_games_of_many_questions_are_solved_at_once():
    references = np.random.default_rng(0).dirichlet(np.ones(3), size=50)
    references[0] = [0.5, 0.5, 0]  # what the reference never says is never said
    together = regularised_nash(W, references, 0.2)
    for reference, p in zip(references, together, strict=True):
        assert p == pytest.approx(regularised_nash(W, reference, 0.2), abs=1e-13)
    assert together[0, 2] == 0
    assert exploitability(W, together) == pytest.approx([exploitability(W, p) for p in together])


@pytest.mark.parametrize("tau", [0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("solve", [regularised_nash, nash_rs])
def test_a_tau_that_regularises_nothing_is_refused(solve, tau):
    with pytest.raises(ValueError, match="tau is a number above 0"):
        solve(W, REF, tau)
    with pytest.raises(ValueError, match="tau"):
        games.accepted(W, REF, REF, tau)


def test_a_tau_that_would_take_minutes_is_refused_at_once():
    with pytest.raises(ValueError, match=r"tau 1e-06 is less than 4e-05"):
        regularised_nash(W, REF, 1e-6)
    assert regularised_nash(np.full((3, 3), 0.5), REF, 1e-6) == pytest.approx(REF)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exploitability(W, [math.nan, 0.5, 0.5]), "distribution"),
        (lambda: exploitability(W, [0.5, 0.5]), "over 2 answers"),
        (lambda: regularised_nash(W, [0.5, 0.5], 0.1), "over 2 answers"),
        (lambda: nash_rs(W, [REF, REF], 0.1), "one policy"),
        (lambda: magnetic_mirror_descent(W, REF, alpha=-1, eta=1, steps=1), "alpha"),
        (lambda: magnetic_mirror_descent(W, REF, alpha=1, eta=0, steps=1), "eta"),
        (lambda: magnetic_mirror_descent(W, REF, alpha=1, eta=1, steps=1.5), "steps"),
        (lambda: mpo(W, REF, alpha=1, eta=1, period=2, magnets=-1), "magnets"),
        (lambda: mpo(W, REF, alpha=1, eta=1, period=0.5, magnets=1), "steps"),
    ],
)
def test_what_a_game_does_not_mean_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("seed", range(5))
def test_nash_rs_and_mirror_descent_agree_on_any_game(seed):
    game = random_game(6, seed)
    ref = np.random.default_rng(seed).dirichlet(np.ones(6))
    assert nash_rs(game, ref, 0.2) == pytest.approx(regularised_nash(game, ref, 0.2), abs=1e-12)


def test_the_inverted_acceptance_is_told_from_the_right_one(monkeypatch):
    right = nash_rs(W, REF, 0.15)

    def inverted(game, p, ref, tau):
        q = ref * (1 - np.exp(-(p @ game) / tau))
        return q / q.sum()

    monkeypatch.setattr(games, "accepted", inverted)
    wrong = nash_rs(W, REF, 0.15)
    assert wrong == pytest.approx([0.730, 0.096, 0.174], abs=5e-4)
    assert np.abs(wrong - right).sum() > 0.1, "the test of the fixed point would not see it"


def test_rejection_accepts_with_the_probabilities_claimed():
    draw = np.random.default_rng(0)
    proposals = draw.choice(3, size=200_000, p=REF)
    losses = (NASH @ W)[proposals]
    kept = proposals[draw.uniform(size=len(proposals)) <= np.exp(-losses / 0.5)]
    counts, expected = np.bincount(kept), len(kept) * games.accepted(W, NASH, REF, 0.5)
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # chi-square of 2 degrees of freedom at 0.001


@pytest.mark.parametrize(
    "matrix", [[[0.5, 0.6], [0.6, 0.5]], [[0.4]], [[0.5, 1.2], [-0.2, 0.5]], [0.5, 0.5], np.zeros((0, 0))]
)
def test_what_is_no_preference_matrix_is_refused(matrix):
    with pytest.raises(ValueError, match="preference matrix"):
        nash_equilibrium(matrix)


def test_what_is_no_policy_is_refused():
    with pytest.raises(ValueError, match="distribution"):
        exploitability(W, [0.5, 0.5, 0.5])
