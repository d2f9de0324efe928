"""FAB-T against closed forms on boxed linear models, against its peer on a trained network, and at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack import fab_base
from pyautoattack.fab_pt import FABAttack_PT
from sklearn.datasets import load_digits
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks import fab
from poise.robust.attacks.base import attack_mode
from poise.robust.attacks.fab import Run
from poise.robust.attacks.fab_projection import Hyperplanes
from poise.robust.noise import Noise
from poise.robust.threats import ORDERS, Threat

NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.1, "l2": 0.5, "l1": 2.0}


def _pairs(problem: SimpleNamespace) -> SimpleNamespace:
    """Every rightly classified image with every wrong class."""
    logits = problem.model(problem.x).detach()
    right, classes = (logits.argmax(1) == problem.y).nonzero().flatten(), logits.shape[1]
    rows, target = right.repeat_interleave(classes), torch.arange(classes).repeat(len(right))
    keep = target != problem.y[rows]
    rows, target = rows[keep], target[keep]
    return SimpleNamespace(
        x=problem.x[rows], y=problem.y[rows], target=target, rows=rows, logits=logits[rows], n=len(logits)
    )


def _least(pairs: SimpleNamespace, distances: Tensor) -> Tensor:
    return torch.full((pairs.n,), math.inf).double().scatter_reduce(0, pairs.rows, distances, "amin")


def _exact(problem: SimpleNamespace, norm: str) -> Tensor:
    """The distance of each image to the nearest hyperplane between its class and another; inf where it is wrong."""
    pairs, weight = _pairs(problem), problem.model.weight.detach()
    missing = (pairs.logits.gather(1, pairs.y[:, None]) - pairs.logits.gather(1, pairs.target[:, None])).squeeze(1)
    step = Hyperplanes(weight[pairs.target] - weight[pairs.y], norm).reach(pairs.x.flatten(1), missing)
    short = (((weight[pairs.target] - weight[pairs.y]) * step).sum(1) < missing * (1 - 1e-9)) & (missing > 0)
    distance = torch.linalg.vector_norm(step, ord=ORDERS[norm], dim=1)
    return _least(pairs, distance.masked_fill(short, math.inf))


@pytest.mark.parametrize("norm", NORMS)
def test_the_distances_on_a_boxed_linear_model_are_the_closed_form(
    norm: str, linear_problem: Callable[..., SimpleNamespace]
) -> None:
    """The least over all targets: a run may meet another wrong class before its own.

    Turning back by a tenth and going 1.05 of the way forward settles 0.5 to 0.9 % beyond a straight boundary, by how
    much of the image's own zero is mixed in.
    """
    problem = linear_problem(seed=0, classes=5, shape=(3, 4, 4), n=24)
    pairs, exact = _pairs(problem), _exact(problem, norm)
    with attack_mode(problem.model):
        point, found = Run(problem.model, norm, 60, pairs.rows).closest(pairs.x, pairs.y, pairs.target, pairs.x)
    least = _least(pairs, found)
    torch.testing.assert_close(least, exact, rtol=9e-3, atol=0)
    assert (least >= exact).all()
    length = torch.linalg.vector_norm((point - pairs.x).flatten(1), ord=ORDERS[norm], dim=1)
    torch.testing.assert_close(length, found)
    assert (problem.model(point).argmax(1) != pairs.y).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.014), ("l2", 0.165), ("l1", 0.6)])
def test_exactly_the_examples_of_negative_slack_are_fooled(
    norm: str, eps: float, assert_closed_form: Callable[..., None]
) -> None:
    assert_closed_form(partial(fab, steps=30), Threat(norm, eps), seed=0, n=48, share=(0.3, 0.7))


@pytest.mark.parametrize("norm", NORMS)
def test_far_from_the_box_the_distance_is_that_of_the_recursion(norm: str) -> None:
    """Between two classes all steps lie on one line, where the place r, 1 on the boundary, follows a scalar formula."""
    model = nn.Linear(6, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0] * 6, [3.0, -2.0, 1.0, 0.5, -0.25, 2.0]]))
        model.bias.copy_(torch.tensor([0.3 + model.weight[1].sum() / 2, 0.0]))
    x, y = torch.full((1, 6), 0.5).double(), torch.tensor([0])
    with attack_mode(model):
        _, found = Run(model, norm, 12, y).closest(x, y, 1 - y, x)
    dual = torch.linalg.vector_norm(model.weight[1].detach(), ord={"linf": 1, "l2": 2, "l1": math.inf}[norm])
    place, least = 0.0, math.inf
    for _ in range(12):
        alpha = min(abs(1 - place) / (abs(1 - place) + 1), 0.1)
        place = (1 - alpha) * (place + 1.05 * (1 - place)) + alpha * 1.05
        if place > 1:
            least, place = min(least, place), 0.9 * place
    torch.testing.assert_close(found, 0.3 / dual.unsqueeze(0) * least, rtol=1e-9, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 0.6))
@settings(deadline=None, max_examples=8, derandomize=True)
def test_on_random_binary_models_it_is_exact_and_never_claims_the_impossible(
    norm: str, seed: int, share: float, assert_exact_between_two_classes: Callable[..., None]
) -> None:
    assert_exact_between_two_classes(partial(fab, steps=20), norm, seed, share, tolerance=0.01)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", [1, 12])
def test_what_it_returns_is_feasible_and_settles_its_verdict(
    norm: str, n: int, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images[0][:n], images[1][:n]
    result = fab(small_net, x, y, Threat(norm, EPS[norm]), steps=8, restarts=2)
    assert result.adversarial.shape == x.shape
    assert result.correct.shape == (n,)
    assert not result.adversarial.requires_grad
    assert ((result.adversarial >= 0) & (result.adversarial <= 1)).all()
    length = torch.linalg.vector_norm((result.adversarial - x).flatten(1), ord=ORDERS[norm], dim=1)
    assert (length <= EPS[norm] * (1 + 1e-5)).all()
    assert torch.equal(result.adversarial[result.correct], x[result.correct])
    with attack_mode(small_net):
        assert torch.equal(small_net(result.adversarial).argmax(1) == y, result.correct)


@pytest.mark.parametrize("norm", NORMS)
def test_it_leaves_no_trace(norm: str, small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, _ = images
    with attack_mode(small_net):
        y = small_net(x).argmax(1)
    nn.functional.cross_entropy(small_net(x), y).backward()
    small_net[5].bias.requires_grad_(False)
    small_net[1].eval()
    snapshot = lambda: (  # noqa: E731
        [t.clone() for t in (*small_net.parameters(), *small_net.buffers(), torch.get_rng_state(), x)],
        [p.grad.clone() for p in small_net.parameters()],
        [p.requires_grad for p in small_net.parameters()],
        [m.training for m in small_net.modules()],
    )
    before = snapshot()
    fab(small_net, x, y, Threat(norm, 0.01), steps=3, restarts=2, targets=2)
    after = snapshot()
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(before[i], after[i], strict=True))
    assert before[2:] == after[2:]


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_of_zero_fools_nobody_who_is_right(
    norm: str, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    result = fab(small_net, x, y, Threat(norm, 0.0), steps=3, restarts=2)
    assert torch.equal(result.adversarial, x)
    small_net.eval()
    assert torch.equal(result.correct, small_net(x).argmax(1) == y)


@pytest.mark.parametrize("norm", NORMS)
def test_a_constant_model_gives_no_nan_and_keeps_its_answer(norm: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    x, y = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 2])
    result = fab(model, x, y, Threat(norm, 0.2), steps=4, restarts=2)
    assert result.correct.tolist() == [False, True, True, False]
    assert torch.equal(result.adversarial, x)


@pytest.mark.parametrize("norm", NORMS)
def test_a_thousand_classes_and_no_more_targets_than_asked(
    norm: str, linear_problem: Callable[..., SimpleNamespace]
) -> None:
    problem, eps = linear_problem(seed=3, classes=1000, shape=(40,), n=16), {"linf": 0.01, "l2": 0.04, "l1": 0.1}[norm]
    least, robust = _exact(problem, norm), problem.model(problem.x).argmax(1) == problem.y
    robust &= least > eps
    results = [fab(problem.model, problem.x, problem.y, Threat(norm, eps), steps=10, targets=t) for t in (1, 9)]
    one, nine = (result.correct for result in results)
    assert not (robust & ~nine).any()
    assert not (nine & ~one).any()
    assert int((nine != robust).sum()) <= 1
    assert 0 < int(robust.sum()) < 16


@pytest.mark.parametrize("norm", NORMS)
def test_an_example_meets_the_same_attack_in_any_batch(
    norm: str, linear_problem: Callable[..., SimpleNamespace]
) -> None:
    problem, eps = linear_problem(seed=1, classes=4, shape=(1, 5, 5), n=9), {"linf": 0.02, "l2": 0.1, "l1": 0.3}[norm]
    run = lambda rows: fab(  # noqa: E731
        problem.model,
        problem.x[rows],
        problem.y[rows],
        Threat(norm, eps),
        steps=4,
        restarts=3,
        noise=Noise.of(0, "test", rows),
    )
    together, apart = run(list(range(9))), [run(rows) for rows in ([0, 1, 2, 3], [4], [5, 6, 7, 8])]
    assert torch.equal(together.correct, torch.cat([part.correct for part in apart]))
    torch.testing.assert_close(together.adversarial, torch.cat([part.adversarial for part in apart]))
    assert 0 < int(together.correct.sum()) < 9


def test_restarts_start_elsewhere_and_only_ever_find_more() -> None:
    """Behind a dead unit the gradient at the image is zero; half the radius away it is not."""
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[10.0, 0.0]]))
        model[0].bias.fill_(-5.1)
        model[2].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model[2].bias.copy_(torch.tensor([1.0, 0.0]))
    x, y = torch.full((8, 2), 0.5), torch.zeros(8, dtype=torch.int64)
    once, often = (fab(model, x, y, Threat("linf", 0.2), steps=5, restarts=r).correct for r in (1, 6))
    assert once.all()
    assert not often.any()


def test_what_cannot_be_attacked_is_refused(
    small_net: nn.Module, images: tuple[Tensor, Tensor], kinked: Callable[[nn.Module, Tensor], nn.Module]
) -> None:
    x, y = images
    with pytest.raises(ValueError, match="at least 1, not 3, 1 and 0"):
        fab(small_net, x, y, Threat("linf", 0.1), steps=3, targets=0)
    with pytest.raises(ValueError, match="the model has one class"):
        fab(nn.Sequential(nn.Flatten(), nn.Linear(36, 1)), x, torch.zeros_like(y), Threat("linf", 0.1))
    with attack_mode(small_net):
        y = small_net(x).argmax(1)
    y[:3] = (y[:3] + 1) % 5
    with pytest.raises(PoiseError, match="example 7 of the batch is not finite at step 0"):
        fab(kinked(small_net, x[7]), x, y, Threat("linf", 0.1), steps=3)


@pytest.fixture(scope="module")
def digits() -> SimpleNamespace:
    """A small network trained on handwritten digits, and 60 that it has not seen."""
    data = load_digits()
    x, y = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(100):
        nn.functional.cross_entropy(net(x[100:]), y[100:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return SimpleNamespace(model=net, x=x[:60], y=y[:60])


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.35), ("l1", 0.9)])
def test_it_agrees_with_pyautoattack_on_a_trained_network(norm: str, eps: float, digits: SimpleNamespace) -> None:
    ours = fab(digits.model, digits.x, digits.y, Threat(norm, eps), steps=20).correct
    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    peer = FABAttack_PT(digits.model, norm=name, n_iter=20, eps=eps, targeted=True, device="cpu")
    with torch.random.fork_rng():
        theirs = digits.model(peer.perturb(digits.x, digits.y)).argmax(1) == digits.y
    assert int((ours != theirs).sum()) <= 1
    assert 0.3 < theirs.double().mean() < 0.7


@pytest.mark.parametrize("norm", NORMS)
def test_it_agrees_with_pyautoattack_where_most_planes_are_out_of_reach(
    norm: str, mnist: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network that masks its gradients most steps go to a corner of the box, by signs of slopes of 1e-8.

    The peer's l2 projection sums in float32 what spans eight orders of magnitude and takes some reachable planes for
    out of reach; it computes in double precision here.
    """
    single = fab_base.projection_l2
    monkeypatch.setattr(fab_base, "projection_l2", lambda *given: single(*(each.double() for each in given)).float())
    x, y, eps = mnist.x[:60], mnist.y[:60], {"linf": 0.3, "l2": 1.0, "l1": 3.0}[norm]
    ours = fab(mnist.model, x, y, Threat(norm, eps), steps=40, targets=3).correct
    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    peer = FABAttack_PT(mnist.model, norm=name, n_iter=40, eps=eps, targeted=True, device="cpu", n_target_classes=3)
    with torch.random.fork_rng():
        theirs = mnist.model(peer.perturb(x, y)).argmax(1) == y
    assert int((ours != theirs).sum()) <= 1
    assert int((~ours).sum()) > 2


@pytest.mark.parametrize("norm", NORMS)
def test_on_the_way_to_a_corner_only_slopes_that_bring_something_move(norm: str) -> None:
    """Under linf moving all is free."""
    w = torch.tensor([[1.0, -0.5, 5e-9, 0.0], [3e-12, -1e-12, 1e-13, 0.0], [0.0, 0.0, 0.0, 0.0]])
    step = Hyperplanes(w, norm).reach(torch.full((3, 4), 0.25), torch.full((3,), 10.0))
    flat = 0.75 if norm == "linf" else 0.0
    assert step.tolist() == [[0.75, -0.25, flat, 0.0], [0.75, -0.25, 0.75, 0.0], [0.0, 0.0, 0.0, 0.0]]
