"""MSD: the best of one step per norm, a point of the union of the balls, and PGD where there is one ball."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks import attack_mode, cross_entropy, msd, msd_perturb, perturb, pgd
from poise.robust.noise import Noise
from poise.robust.threats import ORDERS, Threat

NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.03, "l2": 0.3, "l1": 1.5}
BALLS = {norm: Threat(norm, EPS[norm]) for norm in NORMS}


def _height(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with attack_mode(model), torch.no_grad():
        return cross_entropy(model(x), y)


def _within(x: Tensor, adversarial: Tensor, balls: dict[str, Threat] = BALLS) -> Tensor:
    """(N, P): in which balls."""
    delta = (adversarial - x).flatten(1)
    inside = [torch.linalg.vector_norm(delta, ORDERS[n], dim=1) <= ball.eps * (1 + 1e-5) for n, ball in balls.items()]
    return torch.stack(inside, dim=1)


@pytest.mark.parametrize("eps", [(0.1, 0.4, 1.0), (0.1, 0.45, 1.2)])
def test_on_a_linear_model_it_is_the_union_of_the_closed_forms_and_of_no_single_one(
    eps: tuple[float, ...], linear_problem: Callable[..., SimpleNamespace], slack: Callable[..., Tensor]
) -> None:
    problem = linear_problem(seed=2, classes=3, shape=(30,), n=200, sparse=True)
    balls = {norm: Threat(norm, radius) for norm, radius in zip(NORMS, eps, strict=True)}
    robust = torch.stack([slack(problem.model, problem.x, problem.y, n, b.eps) > 0 for n, b in balls.items()], dim=1)
    sizes = {norm: ball.eps / 20 for norm, ball in balls.items()}
    correct = msd(problem.model, problem.x, problem.y, balls, steps=60, step_sizes=sizes, sparsity=1).correct
    assert torch.equal(correct, robust.all(1))
    assert (robust.sum(0) > correct.sum()).all()


@pytest.mark.parametrize("norm", NORMS)
def test_with_one_norm_it_is_pgd_from_the_image(norm: str, small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    options = {"steps": 6, "sparsity": (2, 5), "restarts": 2, "noise": Noise.of(0, "msd", range(len(x)))}
    ours = msd(small_net, x, y, {norm: BALLS[norm]}, **options)
    theirs = pgd(small_net, x, y, BALLS[norm], random_start=False, **options)
    assert torch.equal(ours.correct, theirs.correct)
    fooled = ~ours.correct
    assert torch.equal(ours.adversarial[fooled], theirs.adversarial[fooled])
    assert fooled.any()


@pytest.mark.parametrize("norm", NORMS)
def test_with_one_norm_training_is_pgd_where_the_loss_rises_at_every_step(
    norm: str, linear_problem: Callable[..., SimpleNamespace]
) -> None:
    problem = linear_problem(seed=2, classes=2, shape=(12,), n=20)
    options = {"steps": 5, "step_size": EPS[norm] / 5, "sparsity": 1}
    point = perturb(problem.model, problem.x, problem.y, BALLS[norm], random_start=False, **options)
    sizes = {norm: options.pop("step_size")}
    assert torch.equal(
        msd_perturb(problem.model, problem.x, problem.y, {norm: BALLS[norm]}, step_sizes=sizes, **options), point
    )


@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_a_step_is_worth_the_best_of_its_norms_and_the_best_is_never_lost(seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
    x = torch.rand(7, 4, 5, generator=generator, dtype=torch.double)
    y = torch.randint(0, 4, (7,), generator=generator)
    noise = Noise.of(seed, "msd", range(7))
    sizes = {norm: EPS[norm] for norm in NORMS}
    one = _height(model, x, y)
    for norm in NORMS:
        single = perturb(model, x, y, BALLS[norm], steps=1, step_size=EPS[norm], random_start=False, noise=noise)
        one = torch.maximum(one, _height(model, single, y))
    reached = msd_perturb(model, x, y, BALLS, steps=1, step_sizes=sizes, noise=noise)
    torch.testing.assert_close(_height(model, reached, y), one)
    longer = msd_perturb(model, x, y, BALLS, steps=steps, step_sizes=sizes, sparsity=5)
    first = msd_perturb(model, x, y, BALLS, steps=1, step_sizes=sizes, sparsity=5)
    assert (_height(model, longer, y) >= _height(model, first, y) - 1e-9).all()
    assert _within(x, longer).any(1).all()


def test_points_lie_in_the_box_and_in_one_of_the_balls_but_not_in_all(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    for adversarial in (
        msd(small_net, x, y, BALLS, steps=7, restarts=4).adversarial,
        msd_perturb(small_net, x, y, BALLS, steps=7),
    ):
        assert adversarial.shape == x.shape
        assert not adversarial.requires_grad
        assert ((adversarial >= 0) & (adversarial <= 1)).all()
        within = _within(x, adversarial)
        assert within.any(1).all()
        assert not within.all()


def test_the_verdict_is_that_of_the_model_and_restarts_only_find_more(
    linear_problem: Callable[..., SimpleNamespace],
) -> None:
    problem = linear_problem(seed=2, classes=10, shape=(24,), n=150)
    balls = {"l2": Threat("l2", 0.3), "l1": Threat("l1", 1.0)}
    once, often = (msd(problem.model, problem.x, problem.y, balls, steps=3, restarts=r) for r in (1, 6))
    assert often.correct.sum() < once.correct.sum()
    assert not (often.correct & ~once.correct).any()
    for result in (once, often):
        assert torch.equal(problem.model(result.adversarial).argmax(1) == problem.y, result.correct)
    wrong = problem.model(problem.x).argmax(1) != problem.y
    assert torch.equal(often.adversarial[wrong], problem.x[wrong])


@pytest.mark.parametrize("attack", [msd, msd_perturb])
def test_it_leaves_no_trace_and_a_failure_neither(
    attack: Callable[..., object],
    small_net: nn.Module,
    images: tuple[Tensor, Tensor],
    kinked: Callable[[nn.Module, Tensor], nn.Module],
) -> None:
    x, y = images
    cross_entropy(small_net(x), y).sum().backward()
    small_net[5].bias.requires_grad_(False)
    state = [t.clone() for t in (*small_net.parameters(), *small_net.buffers())]
    grads, stream = [p.grad.clone() for p in small_net.parameters()], torch.get_rng_state()
    attack(small_net, x, y, BALLS, steps=3)
    with attack_mode(small_net):
        right = small_net(x).argmax(1)
    with pytest.raises(PoiseError, match="example 7 of the batch is not finite at step 0"):
        attack(kinked(small_net, x[7]), x, right, BALLS, steps=3)
    assert all(map(torch.equal, state, (*small_net.parameters(), *small_net.buffers())))
    assert all(map(torch.equal, grads, [p.grad for p in small_net.parameters()]))
    assert [p.requires_grad for p in small_net.parameters()] == [True] * 5 + [False]
    assert all(module.training for module in small_net.modules())
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize("n", [1, 4])
def test_radius_zero_and_a_constant_model(n: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    x, y = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))[:n], torch.tensor([1, 0, 1, 2])[:n]
    result = msd(model, x, y, BALLS, steps=4, restarts=2)
    assert torch.equal(result.correct, y == 1)
    assert not result.adversarial.isnan().any()
    assert torch.equal(msd_perturb(model, x, y, BALLS, steps=4), x)
    nn.init.normal_(model[1].weight)
    nothing = {norm: Threat(norm, 0.0) for norm in NORMS}
    assert torch.equal(msd(model, x, y, nothing, steps=3, restarts=3).adversarial, x)


def test_an_example_does_not_depend_on_its_batch(linear_problem: Callable[..., SimpleNamespace]) -> None:
    problem, noise = linear_problem(seed=1, classes=4, shape=(1, 5, 5), n=9), Noise.of(0, "msd", range(9))
    balls = {"linf": Threat("linf", 0.01), "l1": Threat("l1", 0.1)}

    def attacked(rows: list[int]) -> Tensor:
        own = noise.select(torch.tensor(rows))
        return msd(problem.model, problem.x[rows], problem.y[rows], balls, steps=4, restarts=3, noise=own).adversarial

    apart = torch.cat([attacked(rows) for rows in ([0, 1, 2, 3], [4], [5, 6, 7, 8])])
    torch.testing.assert_close(attacked(list(range(9))), apart)


def test_what_cannot_be_attacked_is_refused(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="at least one threat"):
        msd(small_net, *images, {}, steps=2)
    with pytest.raises(ValueError, match="step sizes are for l2 and threats for linf, l2, l1"):
        msd_perturb(small_net, *images, BALLS, steps=2, step_sizes={"l2": 0.1})
