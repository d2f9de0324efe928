"""Objectives against the numbers of papers/adversarial.md, section 9, and against root finding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from poise.robust.attacks import perturb
from poise.robust.attacks.msd import msd_perturb
from poise.robust.objectives import Objective, ObjectiveContext, ObjectiveOutput, eat_probabilities
from poise.robust.objectives.at import At
from poise.robust.objectives.avg import Avg
from poise.robust.objectives.eat import Eat
from poise.robust.objectives.fgsm_rs import FgsmRs
from poise.robust.objectives.gradalign import GradAlign
from poise.robust.objectives.mart import Mart, mart_losses
from poise.robust.objectives.max import Max
from poise.robust.objectives.mix import Mix
from poise.robust.objectives.msd import Msd
from poise.robust.objectives.one_step import gradient_cosines
from poise.robust.objectives.ramp import Ramp
from poise.robust.objectives.sat import Sat
from poise.robust.objectives.trades import Trades, trades_losses
from poise.robust.threats import Threat

NORMS = ("linf", "l2", "l1")


class _Bound(partial[Tensor]):
    @property
    def threat(self) -> Threat:
        return self.keywords["threat"]


def _bound(norm: str, eps: float, **options: Any) -> _Bound:
    return _Bound(perturb, threat=Threat(norm, eps), **{"steps": 2, "random_start": False, **options})


def _output(objective: Objective, model: nn.Module, x: Tensor, y: Tensor, attacks: Any, **more: Any) -> ObjectiveOutput:
    context = ObjectiveContext(model, x, y, attacks, **more)
    return objective.loss(objective.craft(context), context)


def _plain(net: nn.Module) -> nn.Module:
    """Without dropout, so that two forwards of one batch are the same."""
    net[3].p = 0.0
    return net


# --- TRADES and MART --------------------------------------------------------------------------------------------------

CLEAN, ATTACKED, ZERO = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.5, 1.0, -0.5]]), torch.tensor([0])


def test_the_numbers_of_trades() -> None:
    assert trades_losses(CLEAN, ATTACKED, ZERO, 0.0).item() == pytest.approx(0.169846, abs=1e-6)
    assert trades_losses(CLEAN, ATTACKED, ZERO, 6.0).item() == pytest.approx(3.558505, abs=2e-6)


def test_the_numbers_of_mart() -> None:
    """By hand: p(x)_0 = 0.843795, KL 0.564776; p(x') is proportional to (e^.5, e, e^-.5)."""
    own, other = (math.exp(z) / (math.exp(0.5) + math.e + math.exp(-0.5)) for z in (0.5, 1.0))
    boosted = -math.log(own) - math.log(1.0001 - other)
    assert mart_losses(CLEAN, ATTACKED, ZERO, 0.0).item() == pytest.approx(boosted, rel=1e-5)
    expected = boosted + 5 * 0.564776 * (1 - math.exp(-0.169846))
    assert mart_losses(CLEAN, ATTACKED, ZERO, 5.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("losses", [trades_losses, mart_losses])
def test_gradients_are_those_of_finite_differences_in_both_branches(losses: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, attacked = (torch.randn(3, 4, generator=generator, dtype=torch.double).requires_grad_() for _ in range(2))
    y = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda a, b: losses(a, b, y, 5.0), (clean, attacked))


@pytest.mark.parametrize("losses", [trades_losses, mart_losses])
def test_probabilities_that_underflow_give_finite_gradients(losses: Callable[..., Tensor]) -> None:
    """The plain form of the divergence gives NaN here (in older versions of torch), in one branch or the other."""
    clean = torch.tensor([[300.0, 0.0, -300.0], [0.0, 200.0, 0.0]], requires_grad=True)
    attacked = torch.tensor([[-300.0, 300.0, 0.0], [0.0, 200.0, -400.0]], requires_grad=True)
    losses(clean, attacked, torch.tensor([0, 1]), 6.0).sum().backward()
    assert clean.grad.isfinite().all()
    assert attacked.grad.isfinite().all()
    assert attacked.grad[0].abs().max() > 0.9


def test_beta_zero_is_the_clean_loss_and_eps_zero_has_no_divergence(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    expected = cross_entropy(_plain(copy.deepcopy(small_net))(x), y)
    for eps, beta in ((0.1, 0), (0.0, 6)):
        net = _plain(copy.deepcopy(small_net))
        out = _output(Trades(beta=beta), net, x, y, {"linf": _bound("linf", eps)})
        torch.testing.assert_close(out.loss, expected)
    attack = _bound("linf", 0.1)
    out = _output(Mart(beta=0), _plain(copy.deepcopy(small_net)), x, y, {"linf": attack})
    plain = _plain(copy.deepcopy(small_net))
    point = attack(plain, x, y, spread=0.001)
    plain(x)
    p = plain(point).softmax(1)
    other = p.scatter(1, y[:, None], 0).amax(1)
    boosted = -p.gather(1, y[:, None]).squeeze(1).log() - (1.0001 - other).log()
    torch.testing.assert_close(out.loss, boosted.mean())


def test_trades_attacks_in_eval_mode_and_trains_both_branches_in_train_mode(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    (x, y), net = images, _plain(small_net)
    plain = copy.deepcopy(net)
    attack = _bound("linf", 0.1)
    out = _output(Trades(), net, x, y, {"linf": attack})
    reference = log_softmax(plain.eval()(x), 1).detach()

    def divergence(logits: Tensor, y: Tensor) -> Tensor:
        return kl_div(log_softmax(logits, 1), reference, reduction="none", log_target=True).sum(1)

    point = attack(plain, x, y, loss=divergence, spread=0.001)
    plain.train()
    clean, attacked = plain(x), plain(point)
    kl = kl_div(log_softmax(attacked, 1), clean.softmax(1), reduction="batchmean")
    torch.testing.assert_close(out.loss, cross_entropy(clean, y) + 6 * kl)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), plain.buffers(), strict=True))
    assert net.training
    assert kl > 1e-4  # the attack has left the image


def test_without_a_start_beside_the_image_the_attack_on_the_divergence_is_inert(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    """Why TRADES must have its noise: at the image the divergence is far flatter than from a start beside it."""
    (x, y), net = images, _plain(small_net)
    seen = []
    for spread in (None, 0.001):
        attack = _bound("l2", 0.5, steps=1, step_size=1e-3)
        out = _output(Trades(spread=spread), copy.deepcopy(net).eval(), x, y, {"l2": attack})
        seen.append(out.loss.item() - cross_entropy(copy.deepcopy(net).eval()(x), y).item())
    assert seen[1] > 3 * seen[0]


@pytest.mark.parametrize("norm", NORMS)
def test_the_spread_is_that_of_the_noise_and_stays_feasible(norm: str) -> None:
    x, model = torch.full((50, 1, 10, 10), 0.5), nn.Sequential(nn.Flatten(), nn.Linear(100, 2))
    nn.init.zeros_(model[1].weight)  # no gradient: what comes back is the start
    delta = _bound(norm, 1.0 if norm == "linf" else 10.0)(model, x, torch.zeros(50, dtype=torch.long), spread=0.01) - x
    assert delta.std().item() == pytest.approx(0.01, rel=0.05)
    assert abs(delta.mean().item()) < 1e-3
    cut = _bound(norm, 0.001)(model, x, torch.zeros(50, dtype=torch.long), spread=0.01) - x
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    assert torch.linalg.vector_norm(cut.flatten(1), ord=order, dim=1).max() <= 0.001 * (1 + 1e-3)


# --- one threat or one attack out of several --------------------------------------------------------------------------


def test_sat_draws_thirds(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    attacks = {norm: _bound(norm, 0.1) for norm in NORMS}
    for draw, norm in ((0.0, "linf"), (0.33, "linf"), (0.34, "l2"), (0.66, "l2"), (0.67, "l1"), (1 - 1e-12, "l1")):
        out = _output(Sat(), small_net, *images, attacks, draw=draw)
        assert {other for other in NORMS if f"loss/{other}" in out.metrics} == {norm}
        assert {other: out.metrics[f"weight/{other}"].item() for other in NORMS} == {
            other: float(other == norm) for other in NORMS
        }
        assert "robust/union" not in out.metrics


def test_sequential_avg_takes_the_threats_in_turn_each_against_the_model_it_meets(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    """Three steps of it are three steps of `at` on l1, l2 and linf."""
    results = []
    for sequential in (True, False):
        net, attacks = copy.deepcopy(small_net), {norm: _bound(norm, 0.1) for norm in NORMS}
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for step, norm in enumerate(("l1", "l2", "linf", "l1")):
            objective = Avg(mode="sequential") if sequential else At()
            optimizer.zero_grad()
            given = attacks if sequential else {norm: attacks[norm]}
            _output(objective, net, *images, given, step=step).loss.backward()
            optimizer.step()
        results.append([*net.parameters(), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_eat_draws_in_proportion_to_the_errors() -> None:
    state = {"errors": torch.tensor([2.0, 6.0]).double(), "batches": torch.tensor([10.0, 10.0]).double()}
    torch.testing.assert_close(eat_probabilities(state), torch.tensor([0.25, 0.75]).double())
    even = torch.tensor([0.5, 0.5]).double()
    unseen = {"errors": torch.tensor([2.0, 0.0]).double(), "batches": torch.tensor([10.0, 0.0]).double()}
    torch.testing.assert_close(eat_probabilities(unseen), even)
    torch.testing.assert_close(eat_probabilities(Eat().initial_state(("linf", "l1"))), even)
    perfect = {"errors": torch.zeros(2).double(), "batches": torch.tensor([10.0, 10.0]).double()}
    torch.testing.assert_close(eat_probabilities(perfect), even)


def test_eat_counts_the_errors_of_all_ranks_for_ever(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    attacks, state = {norm: _bound(norm, 0.1) for norm in ("linf", "l1")}, Eat().initial_state(("linf", "l1"))
    seen: dict[str, list[float]] = {"linf": [], "l1": []}
    for step, (draw, norm) in enumerate([(0.49, "linf"), (0.0, "linf"), (0.51, "l1"), (0.0, "linf"), (0.999, "l1")]):
        more = {"draw": draw, "first_in_epoch": step % 2 == 0, "mean": lambda v: (v + 0.5) / 2}
        out = _output(Eat(), small_net, *images, attacks, state=state, **more)
        seen[norm].append((1 - out.metrics[f"robust/{norm}"].item() + 0.5) / 2)
        state = out.state
    assert state["batches"].tolist() == [len(seen["linf"]), len(seen["l1"])] == [3, 2]
    assert state["errors"].tolist() == pytest.approx([sum(seen["linf"]), sum(seen["l1"])])
    linf, l1 = (sum(rates) / len(rates) for rates in seen.values())
    assert eat_probabilities(state).tolist() == pytest.approx([linf / (linf + l1), l1 / (linf + l1)])


def test_mix_trains_at_the_mean_of_the_perturbations(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    (x, y), net = images, _plain(small_net)
    plain, attacks = copy.deepcopy(net), {norm: _bound(norm, 0.1) for norm in NORMS}
    out = _output(Mix(), net, x, y, attacks)
    delta = sum(attack(plain, x, y) - x for attack in attacks.values()) / 3
    torch.testing.assert_close(out.loss, cross_entropy(plain(x + delta), y))
    assert set(out.metrics) == {"loss/mix", "robust/mix"}


def test_no_threat_has_a_loss_above_that_of_max(linear_problem: Callable[..., SimpleNamespace]) -> None:
    """Nor above MSD's where one step is a whole attack: it is then the maximum itself."""
    problem = linear_problem(4, 2, (1, 4, 4), 30)
    attacks = {norm: _bound(norm, eps, steps=1, step_size=eps) for norm, eps in (("linf", 0.06), ("l2", 0.25))}
    batch = (problem.model, problem.x, problem.y)
    each = [_output(At(), *batch, {norm: attack}).loss.item() for norm, attack in attacks.items()]
    worst = _output(Max(), *batch, attacks)
    steepest_step = _output(Msd(steps=1, step_sizes={"linf": 0.06, "l2": 0.25}), *batch, attacks)
    assert 0 < worst.metrics["weight/linf"] < 1
    assert worst.loss.item() > max(each)
    torch.testing.assert_close(steepest_step.loss, worst.loss)
    assert _output(Mix(), *batch, attacks).loss < worst.loss


def test_msd_under_one_norm_is_pgd_from_the_image(linear_problem: Callable[..., SimpleNamespace]) -> None:
    problem = linear_problem(5, 2, (1, 4, 4), 20)
    attack = _bound("l2", 0.3, steps=6)
    batch = (problem.model, problem.x, problem.y)
    pgd_at = _output(At(), *batch, {"l2": attack})
    torch.testing.assert_close(_output(Msd(steps=6), *batch, {"l2": attack}).loss, pgd_at.loss)


def test_msd_is_crafted_from_the_image_with_its_own_steps(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    attacks = {norm: _bound(norm, 0.1) for norm in ("linf", "l2")}
    expected = msd_perturb(small_net, x, y, {norm: attack.threat for norm, attack in attacks.items()}, steps=3)
    points = Msd(steps=3).craft(ObjectiveContext(small_net, x, y, attacks))
    assert list(points) == ["msd"]
    assert torch.equal(points["msd"], expected)


# --- RAMP -------------------------------------------------------------------------------------------------------------


def test_ramp_without_pairing_is_max(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    attacks, results = {norm: _bound(norm, 0.2) for norm in ("linf", "l1")}, []
    for objective in (Ramp(kl_weight=0, projection=None), Max()):
        net = _plain(copy.deepcopy(small_net))
        out = _output(objective, net, *images, attacks)
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ramp_pairs_the_predictions_of_the_examples_that_withstand_the_first_threat(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    (x, y), net = images, _plain(small_net)
    plain, attacks = copy.deepcopy(net), {"linf": _bound("linf", 0.02), "l1": _bound("l1", 3.0)}
    y = plain.eval()(x).argmax(1)
    y[::3] = (y[::3] + 1) % 5
    plain.train()
    out = _output(Ramp(projection=None), net, x, y, attacks)
    points = [attack(plain, x, y) for attack in attacks.values()]
    first, second = (plain(point) for point in points)
    chosen = (first.argmax(1) == y).nonzero().flatten()
    assert 0 < len(chosen) < len(x)
    kl = kl_div(log_softmax(second[chosen], 1), first[chosen].softmax(1), reduction="batchmean")
    worst = torch.stack([cross_entropy(z, y, reduction="none") for z in (first, second)]).amax(0).mean()
    torch.testing.assert_close(out.loss, worst + 5 * kl)


def test_ramp_where_no_example_withstands_has_no_pairing(images: tuple[Tensor, Tensor]) -> None:
    x = images[0]
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    y = model(x).argmin(1)
    attacks = {norm: _bound(norm, 0.01) for norm in ("linf", "l1")}
    out, worst = (_output(objective, model, x, y, attacks) for objective in (Ramp(projection=None), Max()))
    assert torch.equal(out.loss, worst.loss)


def test_the_even_epochs_of_ramp_are_natural(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    (x, y), net = images, _plain(small_net)
    attacks = {norm: _bound(norm, 0.2) for norm in ("linf", "l1")}
    natural = _output(Ramp(), copy.deepcopy(net), x, y, attacks, epoch=2)
    torch.testing.assert_close(natural.loss, cross_entropy(copy.deepcopy(net)(x), y))
    assert set(natural.metrics) == {"loss/clean", "clean"}
    odd = _output(Ramp(), copy.deepcopy(net), x, y, attacks, epoch=3)
    always = _output(Ramp(projection=None), copy.deepcopy(net), x, y, attacks, epoch=2)
    assert torch.equal(odd.loss, always.loss)


# --- FGSM-RS and GradAlign --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "share"), [(1, 3 / 4), (1.25, 55 / 64)])
def test_the_mean_push_of_fgsm_rs_on_a_linear_model(step: float, share: float) -> None:
    """E[delta sign] / eps: a uniform start plus the step, cut at eps, of 200,000 pixels far from the sides."""
    x, y = torch.full((20, 10_000), 0.5), torch.zeros(20, dtype=torch.long)
    model, seen = nn.Linear(10_000, 2), []
    attack = _bound("linf", 0.1)

    def watched(*args: Any, **options: Any) -> Tensor:
        seen.append(attack(*args, **options))
        return seen[-1]

    watched.threat = attack.threat  # type: ignore[attr-defined]
    _output(FgsmRs(step=step), model, x, y, {"linf": watched})
    sign = (model.weight[1] - model.weight[0]).detach().sign()
    assert ((seen[0] - x) * sign).mean().item() / 0.1 == pytest.approx(share, abs=3e-3)


def test_input_gradients_of_a_linear_margin_are_aligned(linear_problem: Callable[..., SimpleNamespace]) -> None:
    """The cosine of a linear binary model is 1, and the objective is FGSM's loss."""
    problem = linear_problem(1, 2, (1, 4, 4), 10)
    cosines, angled = gradient_cosines(problem.model, problem.x, torch.rand_like(problem.x), problem.y)
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    assert angled.all()
    batch = (problem.model, problem.x, problem.y)
    out = _output(GradAlign(), *batch, {"linf": _bound("linf", 0.05)})
    fgsm = _bound("linf", 0.05, steps=1, step_size=0.05)
    torch.testing.assert_close(out.loss, _output(At(), *batch, {"linf": fgsm}).loss)
    assert out.metrics["gradient_cosine"].item() == pytest.approx(1)


def test_the_angle_and_its_gradient_are_those_of_a_quadratic_model() -> None:
    """With margin m = w x_1 x_2, grad_x CE is a positive multiple of (x_2, x_1): the cosine is known.

    With m = x_1 + w x_2^2 / 2 it is one of (1, w x_2), and so is its derivative in w.
    """

    class _Margin(nn.Module):
        def __init__(self, margin: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.w, self.margin = nn.Parameter(torch.tensor(2.0, dtype=torch.double)), margin

        def forward(self, x: Tensor) -> Tensor:
            m = self.margin(self.w, x).unsqueeze(1)
            return torch.cat([torch.zeros_like(m), m], dim=1)

    x, other = torch.tensor([[0.1, 0.9]]).double(), torch.tensor([[0.4, 0.3]]).double()
    y = torch.zeros(1, dtype=torch.long)
    cosines, _ = gradient_cosines(_Margin(lambda w, x: w * x[:, 0] * x[:, 1]), x, other, y)
    torch.testing.assert_close(cosines, nn.functional.cosine_similarity(x.flip(1), other.flip(1)))
    model = _Margin(lambda w, x: x[:, 0] + w * x[:, 1] ** 2 / 2)
    gradient_cosines(model, x, other, y)[0].sum().backward()
    w = torch.tensor(2.0, dtype=torch.double, requires_grad=True)
    one = torch.ones((), dtype=torch.double)
    expected = nn.functional.cosine_similarity(torch.stack([one, 0.9 * w]), torch.stack([one, 0.3 * w]), dim=0)
    expected.backward()
    torch.testing.assert_close(model.w.grad, w.grad)
    assert w.grad.abs() > 1e-3


def test_examples_without_a_gradient_have_no_angle(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    constant = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    nn.init.zeros_(constant[1].weight)
    out = _output(GradAlign(), constant, x, y, {"linf": _bound("linf", 0.1)})
    out.loss.backward()
    assert out.loss.isfinite()
    assert out.metrics["gradient_cosine"] == 1
    assert all(parameter.grad.isfinite().all() for parameter in constant.parameters())
    sure = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    sure[1].bias.data = torch.tensor([60.0, 0.0])  # gradients of 1e-26, whose squares are zero in float32
    cosines, angled = gradient_cosines(sure, x, torch.rand_like(x), torch.zeros(12, dtype=torch.long))
    torch.testing.assert_close(cosines, torch.ones(12))
    assert angled.all()


# --- adversarial logistic regression ----------------------------------------------------------------------------------


class _Logistic(nn.Module):
    """Margin w u on u = 4 (x - 1/2), so that the images 1/4 and 3/4 are u = -1 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        u = 4 * (x - 0.5)
        return torch.cat([-self.w * u / 2, self.w * u / 2], dim=1)


@pytest.mark.parametrize(
    ("e", "optimum"), [(0.0, 2.197225), (0.2, 2.123895), (0.4, 1.900078), (0.6, 1.169403), (0.8, 0.0)]
)
def test_the_optimum_of_adversarial_logistic_regression(e: float, optimum: float) -> None:
    """One label in ten flipped: bisection on the derivative of `at`; w* = 0 exactly from e = 1 - 2q on."""
    x = torch.tensor([[0.25]] * 10 + [[0.75]] * 10, dtype=torch.double)
    y = torch.tensor([1] + [0] * 9 + [0] + [1] * 9)
    model, attack = _Logistic(), _bound("linf", e / 4, steps=1, step_size=1.0)

    def slope(w: float) -> float:
        model.w.data.fill_(w)
        model.w.grad = None
        _output(At(), model, x, y, {"linf": attack}).loss.backward()
        return model.w.grad.item()

    low, high = 0.0, 5.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    assert low == pytest.approx(optimum, abs=2e-6)
