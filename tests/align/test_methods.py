"""The code that acts on language models, on one whose policy is known exactly, against the games it must solve.

An inverted acceptance, a magnet that never lags, mismatched KL coefficients, a length normalisation or a forgotten
token each end in another policy; so the fixed points are tested, and that the known slips miss them.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from poise.align.games import exploitability, mpo, nash_equilibrium, nash_rs, regularised_nash
from poise.align.selfplay import (
    METHODS,
    KLTerm,
    Mpo,
    NashRs,
    PolicyBatch,
    PolicyLoss,
    SelfPlayMethod,
    token_logprobs,
)
from poise.align.selfplay.checks import compute_advantage, compute_policy_loss
from poise.align.selfplay.policy_loss import KLRegularizer, collate, response_logits, selfplay_loss
from poise.errors import UserError

W = np.array([[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]])
REF, MAGNET = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1])


def game_of(n: int, seed: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).uniform(size=(n, n)), 1)
    return upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(n)


def distance(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation."""
    return float(0.5 * np.abs(p - q).sum())


@pytest.fixture
def play_mpo(self_play):
    def play(toy, game, *, iterations, method, lr=0.05):
        play = self_play(toy, game, lr=lr)
        for iteration in range(iterations):
            if method.replaces_reference(iteration):
                play.replace_magnet()
            play.iterate(method, toy.policy(), inner_steps=5)
        return toy.policy()

    return play


@pytest.fixture
def play_nash_rs(self_play):
    def play(toy, game, *, iterations, method, lr=0.03):
        play = self_play(toy, game, lr=lr)
        for _ in range(iterations):
            play.iterate(method, play.reference, inner_steps=2)
        return toy.policy()

    return play


def test_mpo_reaches_the_equilibrium_of_the_game(play_mpo, make_toy):
    policy = play_mpo(make_toy(policy=MAGNET), W, iterations=200, method=Mpo(period=20, alpha=0.1, eta=1))
    assert exploitability(W, mpo(W, MAGNET, alpha=0.1, eta=1, period=20, magnets=10)) < 1e-3
    assert exploitability(W, policy) < 3e-3
    assert distance(policy, nash_equilibrium(W)) < 0.01


def test_mpo_with_a_magnet_that_never_lags_does_not(play_mpo, make_toy):
    class EveryIteration(Mpo):
        """A specification with period 1 is refused."""

        def replaces_reference(self, iteration):
            return iteration > 0

    policy = play_mpo(make_toy(policy=MAGNET), W, iterations=200, method=EveryIteration(period=2, alpha=0.1, eta=1))
    assert exploitability(W, policy) > 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_mpo_between_magnets_reaches_the_regularised_equilibrium_of_whole_responses(seed, play_mpo, make_toy):
    toy, game = make_toy(seed=seed), game_of(15, seed)
    goal = regularised_nash(game, toy.policy(), 0.2)
    assert distance(toy.policy(), goal) > 0.1
    assert distance(play_mpo(toy, game, iterations=100, method=Mpo(period=1000, alpha=0.2, eta=0.5)), goal) < 0.005


def test_mpo_on_responses_of_one_to_three_tokens_reaches_the_equilibrium(play_mpo, make_toy):
    toy, game = make_toy(seed=0), game_of(15, 1)
    before = exploitability(game, toy.policy())
    after = exploitability(game, play_mpo(toy, game, iterations=200, method=Mpo(period=20, alpha=0.1, eta=1)))
    assert before > 0.2
    assert after < 0.03


def test_nash_rs_reaches_the_published_fixed_point(play_nash_rs, make_toy):
    policy = play_nash_rs(make_toy(policy=REF), W, iterations=150, method=NashRs(tau=0.5))
    assert policy == pytest.approx([0.55518, 0.22309, 0.22173], abs=0.004)


@pytest.mark.parametrize("seed", [0, 1])
def test_nash_rs_reaches_the_fixed_point_of_whole_responses(seed, play_nash_rs, make_toy):
    toy, game = make_toy(seed=seed), game_of(15, seed)
    goal = nash_rs(game, toy.policy(), 0.2)
    assert distance(toy.policy(), goal) > 0.1
    assert distance(play_nash_rs(toy, game, iterations=200, method=NashRs(tau=0.2)), goal) < 0.01


def test_nash_rs_with_the_acceptance_inverted_misses_it(play_nash_rs, make_toy):
    """Keeping a proposal with probability 1 - exp(-g / tau) trains close to a best response to the reference."""

    class Inverted(NashRs):
        def advantage(self, preference):
            weights = 1 - (-preference.mean(1, keepdim=True) / float(self.tau)).exp()
            reward = (preference * weights).sum(-1) / weights.sum(-1)
            return reward - reward.mean()

    policy = play_nash_rs(make_toy(policy=REF), W, iterations=150, method=Inverted(tau=0.15))
    assert policy == pytest.approx([0.730, 0.096, 0.174], abs=0.01)
    assert distance(policy, nash_rs(W, REF, 0.15)) > 0.05, "the test of the fixed point would not see it"


def test_nash_rs_with_two_different_coefficients_misses_it(play_nash_rs, make_toy):
    class Mismatched(NashRs):
        def regularizers(self):
            return {"reference": KLTerm("reference", 0.05)}

    policy = play_nash_rs(make_toy(policy=REF), W, iterations=150, method=Mismatched(tau=0.5))
    assert distance(policy, nash_rs(W, REF, 0.5)) > 0.1


def test_the_advantage_of_mpo_is_unbiased():
    """Over every draw of two rollouts and two opponents of three answers, weighed by its probability."""
    policy = np.array([0.2, 0.5, 0.3])
    total = np.zeros(3)
    for drawn in itertools.product(range(3), repeat=4):
        rollouts, opponents = list(drawn[:2]), list(drawn[2:])
        advantage = Mpo(period=2).advantage(torch.tensor(W[np.ix_(rollouts, opponents)])[None])[0].numpy()
        total[rollouts[0]] += policy[list(drawn)].prod() * advantage[0]
    assert total / policy == pytest.approx(W @ policy - 0.5, abs=1e-12)


def test_the_weights_of_nash_rs_are_those_of_rejection():
    """With every answer once among the proposals of a uniform reference, the reward is that against `accepted`."""
    rollouts = np.array([0, 0, 1, 2, 2, 2, 2, 1, 0, 1])
    advantage = NashRs(tau=0.15).advantage(torch.tensor(W[rollouts])[None])[0].numpy()
    for g in range(len(rollouts)):
        rest = np.delete(rollouts, g)
        weights = np.exp(-W[rest].mean(0) / 0.15)
        reward = W @ (weights / weights.sum())
        assert advantage[g] == pytest.approx(reward[rollouts[g]] - reward[rest].mean(), abs=1e-12)


def test_the_advantage_of_nash_rs_has_a_baseline_that_adds_no_bias():
    """Given the other rollouts, the advantages of a rollout differ as its rewards do."""
    rest = [0, 2, 2]
    found = [NashRs(tau=0.3).advantage(torch.tensor(W[[g, *rest]])[None])[0, 0].item() for g in range(3)]
    weights = np.exp(-W[rest].mean(0) / 0.3)
    reward = W @ (weights / weights.sum())
    assert np.diff(found) == pytest.approx(np.diff(reward), abs=1e-12)


@pytest.mark.parametrize("fresh", [True, False])
def test_the_loss_has_the_gradient_of_the_objective_over_whole_responses(fresh, make_toy):
    """Sampled responses, weighed by the policy that they come from, against the exact objective, differentiated."""
    old, magnet = make_toy(seed=3), make_toy(seed=4)
    new = make_toy(seed=3 if fresh else 5)
    batch, worth = new.batch, torch.linspace(-1, 1, len(new.responses))
    previous, other = response_logits(old, batch).detach(), response_logits(magnet, batch).detach()
    anchors = {"magnet": KLRegularizer(0.3, other), "previous": KLRegularizer(2.0, previous)}
    outcome = selfplay_loss(response_logits(new, batch), previous, anchors, batch, worth)
    (found,) = torch.autograd.grad((torch.tensor(old.policy()) * outcome.loss).sum(), new.table)

    def logp(toy):
        return token_logprobs(response_logits(toy, batch), batch).sum(-1)

    mine = logp(new)
    objective = -worth + 0.3 * (mine - logp(magnet).detach()) + 2.0 * (mine - logp(old).detach())
    (exact,) = torch.autograd.grad((mine.exp() * objective).sum(), new.table)
    assert torch.allclose(found.float(), exact, atol=1e-6)


def test_the_gradient_of_the_divergence_is_that_of_the_reverse_kl():
    batch = collate([(0,)], [(1,)], torch.device("cpu"))
    logits = torch.tensor([[1.0, 0.2, -0.5]], requires_grad=True)
    held = {"magnet": KLRegularizer(1.0, torch.tensor([[0.0, 0.5, 0.3]]))}
    every = [batch._replace(ids=torch.tensor([[0, token]])) for token in range(3)]
    losses = [selfplay_loss(logits, logits.detach(), held, one, torch.zeros(1)).loss for one in every]
    (gradient,) = torch.autograd.grad(losses[0].sum(), logits)
    assert gradient[0].tolist() == pytest.approx([0.3524, -0.1909, -0.1615], abs=5e-5)
    assert len({loss.item() for loss in losses}) == 1, "the divergence hangs on the token that was drawn"


def test_what_follows_a_response_does_not_count():
    batch = collate([(0, 1), (0,)], [(3, 2), (1,)], torch.device("cpu"))
    assert batch.ids.tolist() == [[0, 1, 3, 2], [0, 1, 0, 0]]
    assert batch.attention.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.mask.tolist() == [[False, True, True], [True, False, False]]
    logits = torch.randn(2, 4, 5)
    chosen = token_logprobs(response_logits(lambda ids, attention: logits, batch), batch)
    expected = logits.log_softmax(-1)
    assert chosen.sum(-1).tolist() == pytest.approx(
        [(expected[0, 1, 3] + expected[0, 2, 2]).item(), expected[1, 0, 1].item()], abs=1e-6
    )


@pytest.mark.parametrize(("prompts", "responses"), [([()], [(1,)]), ([(1,)], [()])])
def test_an_empty_prompt_or_response_is_refused(prompts, responses):
    with pytest.raises(ValueError, match="at least one token"):
        collate(prompts, responses, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 3, 0), (2, 3)])
def test_preferences_without_another_rollout_or_an_opponent_are_refused(shape):
    """One rollout has no others to be compared with: its advantage would be NaN."""
    for method in (Mpo(period=2), NashRs()):
        with pytest.raises(ValueError, match="G >= 2"):
            method.advantage(torch.full(shape, 0.5))


@pytest.mark.parametrize("tau", [0, -1, float("nan")])
def test_nash_rs_needs_a_tau_above_0(tau):
    with pytest.raises(ValueError, match="tau"):
        NashRs(tau=tau)


@pytest.mark.parametrize(("prompts", "responses"), [([[1.7]], [[2]]), ([[1]], [[2, -1]]), ([[1]], [[0.5]])])
def test_a_number_that_is_no_token_is_never_cut_to_one(prompts, responses):
    with pytest.raises(ValueError, match="token ids are whole numbers"):
        collate(prompts, responses, torch.device("cpu"))


def test_a_loss_of_other_shapes_is_refused():
    """An advantage (N, 1) would be combined with every response."""
    batch = collate([[2], [2]], [[0, 1], [1]], torch.device("cpu"))
    logits = torch.zeros(3, 4)
    anchor = {"magnet": KLRegularizer(0.1, logits)}
    with pytest.raises(ValueError, match=r"advantage is \(2,\) without gradient, not \(2, 1\)"):
        selfplay_loss(logits, logits, anchor, batch, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="without gradient"):
        selfplay_loss(logits, logits, anchor, batch, torch.zeros(2, requires_grad=True))
    with pytest.raises(ValueError, match="anchor 'magnet' has the coefficient -1"):
        selfplay_loss(logits, logits, {"magnet": KLRegularizer(-1, logits)}, batch, torch.zeros(2))
    with pytest.raises(ValueError, match="logits for"):
        selfplay_loss(logits, logits, {"magnet": KLRegularizer(1, logits[:1])}, batch, torch.zeros(2))


def test_every_method_has_the_name_under_which_it_is_registered():
    assert [method.model_fields["name"].default for method in METHODS.values()] == list(METHODS)


class OnlineIpo(SelfPlayMethod):
    """(h_g - h_k - (P(g > k) - 1/2) / tau)^2 over pairs of rollouts, h = ln policy - ln reference (IPO, 2310.12036)."""

    name: str = "online_ipo"
    tau: float

    def advantage(self, preference):
        return (preference - 0.5) / self.tau  # (P, G, G)

    def loss(self, batch):
        log_ratio = token_logprobs(batch.logits, batch.responses) - token_logprobs(batch.reference, batch.responses)
        h = log_ratio.sum(-1).view(batch.advantage.shape[:2])  # (P, G)
        losses = (h[:, :, None] - h[:, None, :] - batch.advantage) ** 2  # (P, G, G)
        return PolicyLoss(losses.mean(2).flatten(), {})


def test_a_loss_over_pairs_of_rollouts_has_the_same_form(make_toy, self_play):
    """The fixed point of IPO on fresh rollouts is the regularised equilibrium: h = P(. > policy) / tau + a constant."""
    play = self_play(make_toy(policy=REF), W, lr=0.02)
    for _ in range(150):
        play.iterate(OnlineIpo(tau=0.5), None, inner_steps=2)
    assert play.toy.policy() == pytest.approx(regularised_nash(W, REF, 0.5), abs=0.004)


# --- methods of the user's code


class Wins(SelfPlayMethod):
    """The win rate; `CHANGE` spoils what it returns."""

    def advantage(self, preference):
        return CHANGE.get("advantage", lambda p: p.mean(2))(preference)

    def regularizers(self):
        return CHANGE.get("regularizers", {})


class WithLoss(Wins):
    def loss(self, batch):
        loss = -batch.advantage.flatten() * token_logprobs(batch.logits, batch.responses).sum(1)  # (N,)
        return CHANGE.get("loss", lambda loss: PolicyLoss(loss, {}))(loss)


CHANGE = {}


def batch_of(toy, advantage):
    logits = response_logits(toy, toy.batch)
    return PolicyBatch(toy.batch, advantage, logits, logits.detach(), logits.detach())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.mean(1), r"returned a tensor of shape \(2, 4\): it must return a tensor \(P, G\) = \(2, 3\) for"),
        (lambda p: p, r"returned a tensor of shape \(2, 3, 4\)"),
        (lambda p: p.mean(2).tolist(), "returned a list"),
        (lambda p: p.mean(2).requires_grad_(), "with a gradient: detach"),
    ],
)
def test_a_wrong_advantage_is_named_with_its_line(monkeypatch, spoil, message):
    preference = torch.rand(2, 3, 4)
    assert torch.equal(compute_advantage(Wins(), preference), preference.mean(2))
    monkeypatch.setitem(CHANGE, "advantage", spoil)
    with pytest.raises(UserError, match="Wins.advantage .*" + message) as caught:
        compute_advantage(Wins(), preference)
    assert "test_methods.py:" in str(caught.value)


def test_a_method_with_a_loss_of_its_own_may_have_an_advantage_of_pairs(monkeypatch):
    monkeypatch.setitem(CHANGE, "advantage", lambda p: p)
    assert compute_advantage(WithLoss(), torch.rand(2, 3, 3)).shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: loss, r"WithLoss.loss returned a tensor of shape \(3,\): it must return a PolicyLoss"),
        (
            lambda loss: PolicyLoss(loss.mean(), {}),
            r"PolicyLoss.loss is a tensor of shape \(\): .* \(3,\), one value per",
        ),
        (lambda loss: PolicyLoss(loss.detach(), {}), "PolicyLoss.loss has no gradient"),
        (lambda loss: PolicyLoss(loss, {"x": loss.mean()}), r"PolicyLoss.metrics\['x'\] has a gradient"),
        (lambda loss: PolicyLoss(loss, {"x": 1.0}), r"PolicyLoss.metrics\['x'\] is a float"),
    ],
)
def test_a_wrong_loss_is_named_with_its_line(monkeypatch, make_toy, spoil, message):
    batch = batch_of(make_toy(policy=REF), torch.ones(1, 3))
    assert compute_policy_loss(WithLoss(), batch).loss.shape == (3,)
    monkeypatch.setitem(CHANGE, "loss", spoil)
    with pytest.raises(UserError, match=message) as caught:
        compute_policy_loss(WithLoss(), batch)
    assert "test_methods.py:" in str(caught.value)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"kl": KLTerm("ema", 0.1)}, r"'kl' is KLTerm\(anchor='ema', coefficient=0.1\): .* 'reference' or 'previous'"),
        ({"kl": 0.1}, "'kl' is 0.1: it must be a KLTerm"),
        ({"kl": KLTerm("reference", -1.0)}, "Wins.loss raised ValueError: anchor 'kl' has the coefficient -1.0"),
    ],
)
def test_wrong_kl_terms_are_named(monkeypatch, make_toy, terms, message):
    monkeypatch.setitem(CHANGE, "regularizers", terms)
    with pytest.raises(UserError, match=message):
        compute_policy_loss(Wins(), batch_of(make_toy(policy=REF), torch.ones(1, 3)))
