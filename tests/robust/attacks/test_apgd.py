"""Auto-PGD against closed forms, its own rules, the contract of attacks, and a peer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks import AttackResult, apgd, apgd_perturb, attack_mode, cross_entropy, cw_loss, kl_from
from poise.robust.attacks.apgd_schedule import HalvingSchedule, SparsitySchedule, checkpoints
from poise.robust.noise import Noise
from poise.robust.threats import ORDERS, Threat

NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.014, "l2": 0.16, "l1": 0.6}


class _Spy(nn.Module):
    """Remembers the points that a model was asked about, and whether a gradient was wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.points, self.graphs = model, [], []

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x.detach().clone())
        self.graphs.append(x.requires_grad)
        return self.model(x)


def _lengths(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ORDERS[norm], dim=1)


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(Threat("linf", 0.1), 100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(Threat("l2", 0.1), 100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(Threat("l1", 1), 100) == tuple(range(4, 101, 4))
    assert checkpoints(Threat("linf", 0.1), 10) == (2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert checkpoints(Threat("l1", 1), 10) == tuple(range(1, 11))
    assert checkpoints(Threat("l2", 1), 1) == (1,)


@pytest.mark.parametrize(("loss", "seed", "options"), [("ce", 0, {}), ("ce", 4, {}), ("targeted", 4, {"targets": 3})])
@pytest.mark.parametrize("norm", NORMS)
def test_apgd_is_the_closed_form_of_a_boxed_ten_class_linear_model_example_by_example(
    norm: str, loss: str, seed: int, options: dict[str, Any], assert_closed_form: Callable[..., None]
) -> None:
    attack = partial(apgd, loss=loss, **options)
    assert_closed_form(attack, Threat(norm, EPS[norm]), seed, n=64, share=(0.4, 0.6))


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 0.6))
@settings(deadline=None, max_examples=6, derandomize=True)
def test_on_random_binary_models_it_is_exact_and_never_claims_the_impossible(
    norm: str, seed: int, share: float, assert_exact_between_two_classes: Callable[..., None]
) -> None:
    attack = partial(apgd, loss="targeted", steps=60)
    assert_exact_between_two_classes(attack, norm, seed, share, tolerance=0.02)


@pytest.mark.parametrize("norm", NORMS)
def test_one_training_step_from_the_image_is_exact_away_from_the_box(
    norm: str, assert_one_step_is_exact: Callable[..., None]
) -> None:
    assert_one_step_is_exact(partial(apgd_perturb, steps=1), norm)


class _Peak(nn.Module):
    """Two classes; the margin of the second over the first peaks at `top`."""

    def __init__(self, top: Tensor) -> None:
        super().__init__()
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        second = -((x - self.top) ** 2).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(second), second], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_are_halved_until_a_peak_inside_the_ball_is_found(norm: str) -> None:
    """Steps of 2 eps alone would leap over it for ever."""
    x, y, eps = torch.full((3, 5), 0.5), torch.zeros(3, dtype=torch.int64), 0.2
    top = 0.5 + eps * torch.tensor([[0.31, -0.17, 0.23, 0.05, -0.29], [0.1] * 5, [0.0, 0.0, 0.0, 0.0, 0.4]])
    point = apgd_perturb(_Peak(top), x, y, Threat(norm, eps), steps=100, loss=cw_loss)
    assert float((point - top).abs().amax()) < 0.02 * eps


def test_l1_steps_grow_sparse_where_few_coordinates_matter(linear_problem: Callable[..., SimpleNamespace]) -> None:
    """The optimum fills the pixels of largest weight one after the other: 1.2 of length takes few of 192."""
    problem = linear_problem(seed=0, classes=2, shape=(3, 8, 8), n=30)
    delta = apgd_perturb(problem.model, problem.x, problem.y, Threat("l1", 1.2), steps=60) - problem.x
    changed = (delta.flatten(1) != 0).sum(1)
    assert (changed <= 6).double().mean() > 0.9
    first = apgd_perturb(problem.model, problem.x, problem.y, Threat("l1", 1.2), steps=1) - problem.x
    assert ((first.flatten(1) != 0).sum(1) >= 9).all()


def test_the_rules_that_judge_steps_at_a_checkpoint() -> None:
    """Four steps since the last one; the three examples rose 2, 3 and 4 times, and the last found nothing better."""
    walk = SimpleNamespace(rises=torch.tensor([2, 3, 4]), best_loss=torch.tensor([5.0, 5.0, 1.0]))
    halving = HalvingSchedule(torch.full((3,), 0.2), torch.ones(3), torch.zeros(3, dtype=torch.bool))
    halving, back = halving.update(walk, 4)
    assert back.tolist() == [True, False, True]
    torch.testing.assert_close(halving.size, torch.tensor([0.1, 0.2, 0.1]))
    walk.rises = torch.tensor([4, 4, 4])
    halving, back = halving.update(walk, 4)
    assert back.tolist() == [False, True, False]  # nobody found better points; two were halved last time

    best = (torch.arange(100) < torch.tensor([[90], [96], [0]])).float()
    walk = SimpleNamespace(best=best, best_loss=torch.zeros(3), x=torch.zeros(3, 100))
    sparsity = SparsitySchedule.begin(Threat("l1", 1.0), walk, 0.2)
    assert sparsity.count.tolist() == [20, 20, 20]
    sparsity, back = sparsity.update(walk, 4)
    assert back.tolist() == [True, False, True]
    assert sparsity.count.tolist() == [60, 64, 1]
    torch.testing.assert_close(sparsity.size, torch.tensor([1.0, 1 / 1.5, 1.0]))
    for _ in range(8):
        sparsity, back = sparsity.update(walk, 4)
        assert not back.any()
    torch.testing.assert_close(sparsity.size, torch.full((3,), 0.1))
    assert SparsitySchedule.begin(Threat("l1", 1.0), walk, None).count.tolist() == [60, 64, 1]


def test_large_radii_come_first_and_what_is_found_there_does_not_count() -> None:
    class Far(nn.Module):
        """Wrong beyond an l1 distance of 1.5 from grey, whatever the direction."""

        def forward(self, x: Tensor) -> Tensor:
            far = (x - 0.5).abs().flatten(1).sum(1)
            return torch.stack([torch.full_like(far, 1.5), far], dim=1)

    x, y = torch.full((6, 40), 0.5), torch.zeros(6, dtype=torch.int64)
    spy = _Spy(Far())
    result = apgd(spy, x, y, Threat("l1", 1.0), steps=20)
    lengths = [float(_lengths(point - 0.5, "l1").max()) for point in spy.points[1:]]
    assert result.correct.all()
    assert (_lengths(result.adversarial - x, "l1") <= 1.0001).all()
    assert len(lengths) == 23
    assert [round(max(part)) for part in (lengths[:7], lengths[7:14], lengths[14:])] == [3, 2, 1]
    spy.points.clear()
    apgd(spy, x, y, Threat("l1", 1.0), steps=20, large_eps=False)
    assert max(float(_lengths(point - 0.5, "l1").max()) for point in spy.points) <= 1.0001
    assert len(spy.points) == 22


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", [cross_entropy, cw_loss])
def test_training_keeps_the_best_of_the_visited_points_at_the_price_of_pgd(
    loss: Callable[[Tensor, Tensor], Tensor], norm: str, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    spy = _Spy(small_net)
    point = apgd_perturb(spy, x, y, Threat(norm, {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]), steps=7, loss=loss)
    assert spy.graphs == [True] * 7 + [False]
    assert torch.equal(spy.points[0], x)
    with attack_mode(small_net), torch.no_grad():
        visited = torch.stack([loss(small_net(at), y) for at in spy.points])
        torch.testing.assert_close(loss(small_net(point), y), visited.amax(0))
    assert not point.requires_grad


def test_where_training_starts(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    """A divergence from the image's own answer has no gradient there: TRADES starts 0.001 N(0, I) away."""
    x, y = images
    small_net.eval()
    kl, threat, spy = kl_from(small_net(x)), Threat("linf", 0.1), _Spy(small_net)
    apgd_perturb(spy, x, y, threat, steps=2, loss=kl, spread=0.001, noise=Noise.of(0, "start", range(12)))
    inside = ((x > 0.01) & (x < 0.99)).flatten(1)
    torch.testing.assert_close((spy.points[0] - x).flatten(1)[inside].std(), torch.tensor(0.001), rtol=0.1, atol=0)
    spy.points.clear()
    apgd_perturb(spy, x, y, threat, steps=2, restarts=2)
    first, second = spy.points[0], spy.points[3]
    assert torch.equal(first, x)
    assert 0.05 < (second - x).abs().amax() <= 0.1


def test_targets_come_in_falling_order_of_the_clean_logits_and_end_with_the_classes() -> None:
    """Of six classes only the fifth in rank can be reached: four targets miss it, five and more do not."""

    class Rigged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            base = torch.tensor([9.0, 5.0, 4.0, 3.0, 2.0, 1.0])
            logits = base.repeat(len(x), 1)
            pixel = x.flatten(1)[:, 0]
            return logits + torch.nn.functional.one_hot(torch.tensor(4), 6) * (8 * pixel).unsqueeze(1) ** 2

    x, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    correct = {
        t: bool(apgd(Rigged(), x, y, Threat("linf", 0.5), loss="targeted", targets=t, steps=10).correct.all())
        for t in (3, 4, 9)
    }
    assert correct == {3: True, 4: False, 9: False}


def test_the_batch_shrinks_to_those_that_stand(linear_problem: Callable[..., SimpleNamespace]) -> None:
    problem = linear_problem(seed=0, classes=10, shape=(24,), n=100)
    problem.y[:30] = (problem.model(problem.x[:30]).argmax(1) + 1) % 10
    spy = _Spy(problem.model)
    result = apgd(spy, problem.x, problem.y, Threat("linf", 0.05), steps=20, restarts=2)
    sizes = [len(point) for point in spy.points]
    assert sizes[0] == 100
    assert sizes[1] <= 70
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[20] < sizes[1]
    assert sizes[-1] <= int((~result.correct).sum()) + int(result.correct.sum())
    assert torch.equal(result.adversarial[:30], problem.x[:30])
    assert not result.correct[:30].any()


def test_restarts_only_find_more_and_keep_what_fooled_first(linear_problem: Callable[..., SimpleNamespace]) -> None:
    problem, threat = linear_problem(seed=2, classes=10, shape=(24,), n=150), Threat("l1", 1.0)
    once, often = (
        apgd(problem.model, problem.x, problem.y, threat, steps=3, large_eps=False, restarts=r) for r in (1, 8)
    )
    assert often.correct.sum() < once.correct.sum()
    assert not (often.correct & ~once.correct).any()
    assert torch.equal(often.adversarial[~once.correct], once.adversarial[~once.correct])


@pytest.mark.parametrize("norm", NORMS)
def test_it_leaves_no_trace_and_a_failure_neither(
    norm: str,
    small_net: nn.Module,
    images: tuple[Tensor, Tensor],
    kinked: Callable[[nn.Module, Tensor], nn.Module],
) -> None:
    x, y = images
    cross_entropy(small_net(x), y).sum().backward()
    small_net[5].bias.requires_grad_(False)
    small_net[1].eval()
    state = [t.clone() for t in (*small_net.parameters(), *small_net.buffers())]
    grads, stream = [p.grad.clone() for p in small_net.parameters()], torch.get_rng_state()
    flags, inputs = [m.training for m in small_net.modules()], x.clone()
    for attack in (apgd, apgd_perturb):
        for bn_mode in ("eval", "train"):
            attack(small_net, x, y, Threat(norm, 0.3), steps=3, restarts=2, bn_mode=bn_mode)
        with attack_mode(small_net):
            right = small_net(x).argmax(1)
        with pytest.raises(PoiseError, match="example 7 of the batch is not finite at step 0"):
            attack(kinked(small_net, x[7]), x, right, Threat(norm, 0.3), steps=3, random_start=False)
    assert all(map(torch.equal, state, (*small_net.parameters(), *small_net.buffers())))
    assert all(map(torch.equal, grads, [p.grad for p in small_net.parameters()]))
    assert [p.requires_grad for p in small_net.parameters()] == [True] * 5 + [False]
    assert [m.training for m in small_net.modules()] == flags
    assert torch.equal(stream, torch.get_rng_state())
    assert torch.equal(x, inputs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted"])
@pytest.mark.parametrize("n", [1, 12])
def test_points_are_feasible_and_the_verdict_is_that_of_the_model(
    n: int, loss: str, norm: str, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, eps = images[0][:n], {"linf": 0.05, "l2": 0.3, "l1": 1.0}[norm]
    with attack_mode(small_net):
        y = small_net(x).argmax(1)
    result = apgd(small_net, x, y, Threat(norm, eps), loss=loss, steps=7, restarts=2, targets=2)
    assert ((result.adversarial >= 0) & (result.adversarial <= 1)).all()
    assert (_lengths(result.adversarial - x, norm) <= eps * (1 + 1e-5)).all()
    with attack_mode(small_net):
        assert torch.equal(small_net(result.adversarial).argmax(1) == y, result.correct)


@pytest.mark.parametrize("norm", NORMS)
def test_radius_zero_a_constant_model_and_one_gradient_free_class(norm: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.5]))
    x, y = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 2])
    for loss in ("ce", "dlr", "targeted"):
        result = apgd(model, x, y, Threat(norm, 0.2), loss=loss, steps=5, restarts=2)
        assert result.correct.tolist() == [False, True, True, False]
        assert torch.equal(result.adversarial[[0, 3]], x[[0, 3]])
        assert not result.adversarial.isnan().any()
    assert torch.equal(apgd_perturb(model, x, y, Threat(norm, 0.2), steps=4), x)
    nn.init.zeros_(model[1].bias)
    assert apgd(model, x, torch.zeros_like(y), Threat(norm, 0.2), loss="targeted", steps=3).correct.all()
    nn.init.normal_(model[1].weight)
    nothing = apgd(model, x, y, Threat(norm, 0.0), steps=3)
    assert torch.equal(nothing.adversarial, x)
    assert torch.equal(nothing.correct, model(x).argmax(1) == y)


def test_few_and_many_classes(linear_problem: Callable[..., SimpleNamespace], slack: Callable[..., Tensor]) -> None:
    for classes, targets in ((2, 9), (3, 9), (4, 9), (1000, 2)):
        problem = linear_problem(seed=3, classes=classes, shape=(10,), n=20)
        result = apgd(
            problem.model, problem.x, problem.y, Threat("linf", 0.03), loss="targeted", targets=targets, steps=25
        )
        robust = slack(problem.model, problem.x, problem.y, "linf", 0.03) > 0
        assert result.correct[robust].all()
        assert (result.correct != robust).sum() <= (0 if classes < 1000 else 1)


def test_what_cannot_be_done_is_refused(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, threat = images[0], Threat("linf", 0.1)
    two = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(ValueError, match="DLR loss needs at least 3 classes, the model has 2"):
        apgd(two, x, two(x).argmax(1), threat, loss="dlr", steps=2)
    with pytest.raises(ValueError, match="unknown loss 'dlr-t': use one of ce, cw, dlr, targeted"):
        apgd(small_net, *images, threat, loss="dlr-t")
    with pytest.raises(ValueError, match="at least 1, not 0, 1 and 9"):
        apgd(small_net, *images, threat, steps=0)


@pytest.mark.parametrize("norm", NORMS)
def test_an_example_depends_neither_on_its_batch_nor_on_who_has_left(
    norm: str, linear_problem: Callable[..., SimpleNamespace]
) -> None:
    problem, noise = linear_problem(seed=1, classes=5, shape=(1, 5, 5), n=12), Noise.of(0, "apgd", range(12))
    threat = Threat(norm, {"linf": 0.02, "l2": 0.1, "l1": 0.3}[norm])

    def attacked(rows: list[int]) -> AttackResult:
        x, y, own = problem.x[rows], problem.y[rows], noise.select(torch.tensor(rows))
        return apgd(problem.model, x, y, threat, loss="targeted", steps=12, restarts=2, targets=2, noise=own)

    together, parts = attacked(list(range(12))), [attacked(rows) for rows in ([0, 1, 2, 3], [4], [*range(5, 12)])]
    torch.testing.assert_close(together.adversarial, torch.cat([part.adversarial for part in parts]))
    assert torch.equal(together.correct, torch.cat([part.correct for part in parts]))
    assert 0 < together.correct.sum() < 12


@pytest.mark.parametrize(("norm", "eps", "seeds"), [("linf", 0.33, 1), ("l2", 1.2, 1), ("l1", 6.0, 3)])
def test_it_finds_what_the_peer_finds_on_an_adversarially_trained_network(
    norm: str, eps: float, seeds: int, mnist: SimpleNamespace
) -> None:
    """Up to one example a run; several runs under l1, where one run says little on this network."""
    peer = pytest.importorskip("pyautoattack.autopgd_base")
    n, ours, theirs = 50, 0, 0
    x, y, options = mnist.x[:n], mnist.y[:n], {"n_iter": 50, "device": "cpu", "logger": logging.getLogger("peer")}
    with attack_mode(mnist.model):
        for seed in range(seeds):
            attack = peer.APGDAttack(
                mnist.model, norm=norm.capitalize(), eps=eps, seed=seed, use_largereps=norm == "l1", **options
            )
            theirs += int((mnist.model(attack.perturb(x, y)).argmax(1) == y).sum())
            noise = Noise.of(seed, "peer", range(n))
            ours += int(apgd(mnist.model, x, y, Threat(norm, eps), steps=50, noise=noise).correct.sum())
    assert ours <= theirs + seeds
    assert 0 < ours < n * seeds
