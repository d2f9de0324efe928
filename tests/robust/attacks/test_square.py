"""Square attack: closed forms on linear models, what it asks the model, and a peer."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks.losses import cw_loss
from poise.robust.attacks.square import pair, square, window_share
from poise.robust.noise import Noise
from poise.robust.threats import Threat

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


class _Watched(nn.Module):
    """A model that keeps what it was asked."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        return self.model(x)


def _always_first(x: Tensor) -> Tensor:
    return x.new_tensor([1.0, 0.0, 0.0]).expand(len(x), -1)


def _images(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("norm", "eps", "reached"), [("linf", 0.014, 0.9), ("l2", 0.16, 0.5), ("l1", 0.6, 0.9)])
def test_it_never_breaks_what_cannot_be_broken_and_finds_most_of_the_rest_on_a_boxed_linear_model(
    norm: str,
    eps: float,
    reached: float,
    linear_problem: Callable[..., SimpleNamespace],
    slack: Callable[..., Tensor],
) -> None:
    problem = linear_problem(seed=0, classes=10, shape=(3, 8, 8), n=64)
    exact = slack(problem.model, problem.x, problem.y, norm, eps)
    correct = square(problem.model, problem.x, problem.y, Threat(norm, eps), queries=500).correct
    within_reach = slack(problem.model, problem.x, problem.y, norm, 0.9 * eps) < 0
    assert correct[exact > 0].all()
    assert within_reach.sum() >= 20
    assert (~correct[within_reach]).double().mean() >= reached


@pytest.mark.parametrize("norm", NORMS)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(1, 1, 1), (3, 1, 1), (1, 2, 2), (1, 4, 9), (2, 9, 4), (3, 7, 7), (1, 12, 12), (20,)]),
    share=st.floats(0.001, 0.7),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=10, derandomize=True)
def test_every_candidate_is_feasible(
    norm: str, seed: int, shape: tuple[int, ...], share: float, dtype: torch.dtype
) -> None:
    d = math.prod(shape)
    eps = share * {"linf": 1.0, "l2": math.sqrt(d), "l1": d}[norm]
    x = (2 * _images(1, *shape, seed=seed) - 0.5).clamp(0, 1).to(dtype)
    torch.manual_seed(seed)
    weight = torch.randn(d, 4, dtype=dtype)
    model = _Watched(lambda z: 5 * nn.functional.one_hot(torch.zeros(len(z)).long(), 4) * d + z.flatten(1) @ weight)
    result = square(model, x, torch.zeros(1).long(), Threat(norm, eps), queries=60)
    candidates = torch.cat([*model.asked, result.adversarial])
    assert len(model.asked) == 61
    assert candidates.shape[1:] == shape
    assert candidates.dtype == dtype
    assert ((candidates >= 0) & (candidates <= 1)).all()
    length = torch.linalg.vector_norm((candidates - x).flatten(1).double(), ord=ORDER[norm], dim=1)
    assert (length <= eps * (1 + 1e-5) + 1e-7).all()
    assert (length > 0).any()


@pytest.mark.parametrize(
    ("step", "halvings"),
    [
        *[(0, 0), (5, 0), (6, 1), (25, 1), (26, 2), (100, 2), (101, 3), (250, 3), (251, 4), (500, 4), (501, 5)],
        *[(1000, 5), (1001, 6), (2000, 6), (2001, 7), (3000, 7), (3001, 8), (4000, 8), (4001, 9), (4999, 9)],
    ],
)
def test_the_share_of_the_window_halves_on_the_schedule_of_the_paper(step: int, halvings: int) -> None:
    assert window_share(step, 5000, 0.8) == 0.8 / 2**halvings
    assert window_share(2 * step, 10_000, 0.3) == 0.3 / 2**halvings


@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 4)])
@pytest.mark.parametrize("size", [(3, 3), (5, 5), (8, 8), (4, 9), (1, 6)])
def test_the_pair_of_bumps_is_a_sum_of_nested_rectangles(norm: str, power: int, size: tuple[int, int]) -> None:
    """Rectangle k reaches k pixels from the middle of its half, as far as the border, and weighs (k + 1)^-power."""
    height, width = size
    expected = torch.zeros(height, width, dtype=torch.float64)
    for sign, first, rows in ((1, 0, height // 2), (-1, height // 2, height - height // 2)):
        half = torch.zeros(rows, width, dtype=torch.float64)
        for k in range(max(rows, width) // 2 + 1):
            top, left = max(rows // 2 - k, 0), max(width // 2 - k, 0)
            half[top : rows // 2 + k + 1, left : width // 2 + k + 1] += (k + 1.0) ** -power
        if rows:
            expected[first : first + rows] = sign * half / half.norm(p=ORDER[norm])
    torch.testing.assert_close(pair(height, width, int(ORDER[norm])), expected / expected.norm(p=ORDER[norm]))


def _spans(changed: Tensor) -> list[tuple[int, int]]:
    """(height, width) of the smallest rectangle round the changes of each (C, H, W)."""
    places = [c.any(0).nonzero() for c in changed]
    return [tuple((at.amax(0) - at.amin(0) + 1).tolist()) for at in places]


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 12, 12)])
def test_linf_candidates_change_one_square_of_the_scheduled_size_to_plus_or_minus_eps(shape: tuple[int, ...]) -> None:
    model, x = _Watched(_always_first), 0.3 + 0.4 * _images(2, *shape)
    result = square(model, x, torch.zeros(2).long(), Threat("linf", 0.1), queries=200)
    start = model.asked[1]
    assert result.correct.all()
    assert torch.equal(result.adversarial, start)
    stripes = (start - x)[:, :, :1]
    torch.testing.assert_close(start - x, stripes.expand(-1, -1, 12, -1))
    torch.testing.assert_close(stripes.abs(), torch.full_like(stripes, 0.1))
    assert 0.2 < (stripes > 0).double().mean() < 0.8
    widest = set()
    for step, candidate in enumerate(model.asked[2:]):
        side = max(round(math.sqrt(window_share(step, 200) * 144)), 1)
        changed = (candidate - start).abs() > 1e-9
        for height, width in _spans(changed):
            assert 0 < height <= side
            assert 0 < width <= side
            widest.add((side, height))
        torch.testing.assert_close((candidate - x).abs(), torch.full_like(x, 0.1))
    assert {(11, 11), (8, 8), (5, 5), (4, 4), (3, 3), (2, 2), (1, 1)} <= widest


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_other_norms_change_two_windows_and_use_their_radius_up(norm: str) -> None:
    x = 0.3 + 0.4 * _images(1, 1, 20, 20)
    eps, model = 1.0, _Watched(_always_first)
    square(model, x, torch.zeros(1).long(), Threat(norm, eps), queries=100)
    start = model.asked[1]
    assert (start - x).norm(p=ORDER[norm]) == pytest.approx(eps)
    for step, candidate in enumerate(model.asked[2:]):
        side = max(round(math.sqrt(window_share(step, 100) * 400)), 3) | 1
        changed = ((candidate - start).abs() > 1e-9)[0, 0]
        assert 0 < changed.sum() <= 2 * side * side
        assert changed.any(0).sum() <= 2 * side
        length = (candidate - x).norm(p=ORDER[norm])
        assert length == pytest.approx(eps) or ((candidate == 0) | (candidate == 1)).any()


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_returned_is_the_best_of_all_that_was_tried(norm: str, small_net: nn.Module) -> None:
    """So no accepted candidate has a larger margin of the true class than the one before."""
    x = _images(1, 1, 6, 6).float()
    y = small_net.eval()(x).argmax(1)
    model = _Watched(small_net)
    result = square(model, x, y, Threat(norm, 0.01), queries=150)
    tried = cw_loss(small_net(torch.cat(model.asked[1:])), y.expand(150))
    assert bool(result.correct)
    torch.testing.assert_close(cw_loss(small_net(result.adversarial), y), tried.amax()[None])
    assert (tried.cummax(0).values.diff() > 0).sum() > 5


@pytest.mark.parametrize("norm", NORMS)
def test_an_example_meets_the_same_attack_in_any_batch(
    norm: str, linear_problem: Callable[..., SimpleNamespace]
) -> None:
    problem = linear_problem(seed=3, classes=5, shape=(2, 6, 6), n=9)
    threat = Threat(norm, {"linf": 0.02, "l2": 0.15, "l1": 0.7}[norm])

    def run(rows: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        noise = Noise.of(seed, "test", rows)
        result = square(problem.model, problem.x[rows], problem.y[rows], threat, queries=80, restarts=2, noise=noise)
        return result.adversarial, result.correct

    everyone = list(range(9))
    together = run(everyone)
    apart = [torch.cat(parts) for parts in zip(*(run(r) for r in ([0, 1, 2], [3], [4, 5, 6, 7, 8])), strict=True)]
    torch.testing.assert_close(together[0], apart[0])
    assert torch.equal(together[1], apart[1])
    assert 0 < together[1].sum() < 9
    assert not torch.equal(together[0], run(everyone, seed=1)[0])


@pytest.mark.parametrize(("norm", "peers_name", "eps"), [("linf", "Linf", 0.02), ("l2", "L2", 0.4), ("l1", "L1", 1.0)])
def test_it_is_as_strong_as_pyautoattack_on_a_small_network(norm: str, peers_name: str, eps: float) -> None:
    peer = pytest.importorskip("pyautoattack.square").SquareAttack
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)).eval()
    x = _images(60, 3, 8, 8).float()
    y = net(x).argmax(1)
    ours = int(square(net, x, y, Threat(norm, eps), queries=300).correct.sum())
    theirs = int((net(peer(net, norm=peers_name, eps=eps, n_queries=300).perturb(x, y)).argmax(1) == y).sum())
    assert 15 < ours < 50
    assert ours <= theirs + 3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 1000])
def test_few_and_many_classes(norm: str, classes: int, linear_problem: Callable[..., SimpleNamespace]) -> None:
    problem = linear_problem(seed=1, classes=classes, shape=(1, 5, 5), n=20)
    wrong = problem.model(problem.x).argmax(1) != problem.y
    threat = Threat(norm, {"linf": 0.4, "l2": 2.0, "l1": 8.0}[norm])
    result = square(problem.model, problem.x, problem.y, threat, queries=100)
    assert (~result.correct).sum() > wrong.sum()
    assert torch.equal(problem.model(result.adversarial).argmax(1) == problem.y, result.correct)
    assert torch.equal(result.adversarial[wrong], problem.x[wrong])


@pytest.mark.parametrize("norm", NORMS)
def test_one_pixel_is_driven_to_the_side_that_fools(norm: str) -> None:
    """z = (x, .5): fooled exactly where x - eps < .5."""
    x = torch.tensor([0.55, 0.65, 0.75, 0.85]).view(4, 1, 1, 1)
    model = _Watched(lambda z: torch.cat([z.flatten(1), torch.full((len(z), 1), 0.5)], 1))
    result = square(model, x, torch.zeros(4).long(), Threat(norm, 0.2), queries=20)
    assert result.correct.tolist() == [False, False, True, True]
    torch.testing.assert_close(result.adversarial.flatten()[2:], torch.tensor([0.55, 0.65]))


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_of_zero_and_a_constant_model(norm: str) -> None:
    x, y = _images(4, 1, 5, 5), torch.tensor([0, 1, 0, 2])
    for eps in (0.0, 0.2):
        model = _Watched(_always_first)
        result = square(model, x, y, Threat(norm, eps), queries=30, restarts=2)
        assert result.correct.tolist() == [True, False, True, False]
        assert torch.equal(result.adversarial[[1, 3]], x[[1, 3]])
        assert torch.equal(result.adversarial, x) == (eps == 0)
        assert [len(asked) for asked in model.asked] == ([4] if eps == 0 else [4] + [2] * 60)


def test_the_batch_shrinks_to_those_who_stand(linear_problem: Callable[..., SimpleNamespace]) -> None:
    problem = linear_problem(seed=2, classes=10, shape=(3, 6, 6), n=50)
    model = _Watched(problem.model)
    result = square(model, problem.x, problem.y, Threat("linf", 0.02), queries=300)
    sizes = [len(asked) for asked in model.asked]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 301
    assert int(result.correct.sum()) <= sizes[-1] <= int(result.correct.sum()) + 2
    assert len(set(sizes[2:])) <= 12


def test_restarts_only_ever_find_more_and_the_first_fooling_point_is_kept(
    linear_problem: Callable[..., SimpleNamespace],
) -> None:
    problem, threat = linear_problem(seed=2, classes=10, shape=(3, 6, 6), n=100), Threat("l2", 0.15)
    once, often = (square(problem.model, problem.x, problem.y, threat, queries=30, restarts=r) for r in (1, 4))
    assert often.correct.sum() < once.correct.sum()
    assert not (often.correct & ~once.correct).any()
    assert torch.equal(often.adversarial[~once.correct], once.adversarial[~once.correct])


@pytest.mark.parametrize("norm", NORMS)
def test_it_leaves_no_trace_and_its_result_can_be_trained_on(
    norm: str, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    nn.functional.cross_entropy(small_net(x), y).backward()
    tensors = lambda: [*small_net.parameters(), *small_net.buffers(), *(p.grad for p in small_net.parameters())]  # noqa: E731
    before, stream, inputs = [t.detach().clone() for t in tensors()], torch.get_rng_state(), x.clone()
    result = square(small_net, x, y, Threat(norm, 0.3), queries=40)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True))
    assert torch.equal(stream, torch.get_rng_state())
    assert torch.equal(x, inputs)
    assert all(m.training for m in small_net.modules())
    assert all(p.requires_grad for p in small_net.parameters())
    nn.functional.cross_entropy(small_net(result.adversarial), y).backward()
    result.correct.logical_not_()


def test_scores_that_are_no_numbers_name_the_example_and_the_query() -> None:
    calls = iter(range(100))

    def broken(x: Tensor) -> Tensor:
        logits = _always_first(x).clone()
        if next(calls) >= 32:  # the clean images are call 0
            logits[-1, 2] = torch.nan
        return logits

    with pytest.raises(PoiseError, match="example 3 of the batch are not numbers at query 32"):
        square(_Watched(broken), _images(4, 1, 5, 5), torch.tensor([0, 1, 0, 0]), Threat("linf", 0.1), queries=80)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\) or vectors \(N, d\), not the shape \(2, 5, 5\)"):
        square(_Watched(_always_first), _images(2, 5, 5), torch.zeros(2).long(), Threat("linf", 0.1), queries=5)
