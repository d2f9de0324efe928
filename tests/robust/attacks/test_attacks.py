"""PGD against closed forms on linear models, and the contract that an attack leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks import AttackResult, apgd, attack_mode, msd, perturb, pgd
from poise.robust.noise import Noise
from poise.robust.threats import Threat

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.014), ("l2", 0.16), ("l1", 0.6)])
def test_pgd_is_the_closed_form_of_a_boxed_ten_class_linear_model_example_by_example(
    norm: str, eps: float, seed: int, assert_closed_form: Callable[..., None]
) -> None:
    attack = partial(pgd, steps=100, step_size=eps / 20, restarts=3, sparsity=1)
    assert_closed_form(attack, Threat(norm, eps), seed, n=64, share=(0.4, 0.6))


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 0.6))
@settings(deadline=None, max_examples=8, derandomize=True)
def test_pgd_on_random_binary_models_is_exact_and_never_claims_the_impossible(
    norm: str, seed: int, share: float, assert_exact_between_two_classes: Callable[..., None]
) -> None:
    """For two classes the loss grows with one margin, so the attack must reach it up to the length of its steps."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> AttackResult:
        return pgd(model, x, y, threat, steps=100, step_size=threat.eps / 25, sparsity=1)

    assert_exact_between_two_classes(attack, norm, seed, share, tolerance=0.1)


@pytest.mark.parametrize("norm", NORMS)
def test_one_step_of_length_eps_from_the_image_is_exact_away_from_the_box(
    norm: str, assert_one_step_is_exact: Callable[..., None]
) -> None:
    assert_one_step_is_exact(partial(perturb, steps=1, random_start=False, sparsity=1), norm)


def _snapshot(net: nn.Module) -> list[object]:
    tensors = [t.clone() for t in (*net.parameters(), *net.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return [*tensors, *grads, *(p.requires_grad for p in net.parameters()), *(m.training for m in net.modules())]


def _same(before: list[object], after: list[object]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [pgd, perturb])
def test_an_attack_leaves_no_trace(
    attack: Callable[..., object], norm: str, bn_mode: str, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    nn.functional.cross_entropy(small_net(x), y).backward()
    small_net[5].bias.requires_grad_(False)
    small_net[1].eval()
    before, stream, inputs = _snapshot(small_net), torch.get_rng_state(), x.clone()
    attack(small_net, x, y, Threat(norm, 0.3), steps=3, restarts=2, bn_mode=bn_mode)
    assert _same(before, _snapshot(small_net))
    assert torch.equal(stream, torch.get_rng_state())
    assert torch.equal(x, inputs)
    assert not x.requires_grad


def test_the_model_is_restored_when_the_attack_fails(
    small_net: nn.Module, images: tuple[Tensor, Tensor], kinked: Callable[[nn.Module, Tensor], nn.Module]
) -> None:
    x, y = images
    before = _snapshot(small_net)
    with pytest.raises(PoiseError, match="example 7 of the batch is not finite at step 0"):
        perturb(kinked(small_net, x[7]), x, y, Threat("l2", 0.3), steps=3, random_start=False)
    assert _same(before, _snapshot(small_net))


def test_weight_gradients_are_not_even_computed(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    with attack_mode(small_net):
        assert not any(p.requires_grad for p in small_net.parameters())
        assert not any(m.training for m in small_net.modules())
    assert all(p.requires_grad for p in small_net.parameters())


def test_bn_mode_train_normalises_by_the_batch_without_dropout(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, _ = images
    with attack_mode(small_net, "train"):
        seen = small_net(x)
    small_net[3].p = 0.0
    torch.testing.assert_close(seen, small_net(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", [1, 12])
def test_adversarial_examples_are_feasible(
    norm: str, n: int, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images[0][:n], images[1][:n]
    eps = {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]
    result = pgd(small_net, x, y, Threat(norm, eps), steps=7, restarts=2)
    point = perturb(small_net, x, y, Threat(norm, eps), steps=7)
    for adversarial in (result.adversarial, point):
        assert adversarial.shape == x.shape
        assert not adversarial.requires_grad
        assert ((adversarial >= 0) & (adversarial <= 1)).all()
        length = torch.linalg.vector_norm((adversarial - x).flatten(1), ord=ORDER[norm], dim=1)
        assert (length <= eps * (1 + 1e-5)).all()
    assert result.correct.shape == (n,)
    with attack_mode(small_net):
        assert torch.equal(small_net(result.adversarial).argmax(1) == y, result.correct)


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_of_zero_returns_the_images(norm: str, small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    assert torch.equal(perturb(small_net, x, y, Threat(norm, 0.0), steps=3), x)
    result = pgd(small_net, x, y, Threat(norm, 0.0), steps=3)
    small_net.eval()
    assert torch.equal(result.adversarial, x)
    assert torch.equal(result.correct, small_net(x).argmax(1) == y)


@pytest.mark.parametrize("norm", NORMS)
def test_a_constant_model_gives_no_nan_and_keeps_its_answer(norm: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    x, y = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 2])
    result = pgd(model, x, y, Threat(norm, 0.2), steps=4, restarts=2)
    assert result.correct.tolist() == [False, True, True, False]
    assert torch.equal(result.adversarial[[0, 3]], x[[0, 3]])
    assert torch.equal(perturb(model, x, y, Threat(norm, 0.2), steps=4, random_start=False), x)


@pytest.mark.parametrize("norm", NORMS)
def test_noise_comes_from_the_generator_and_one_per_example_frees_it_from_the_batch(
    norm: str, linear_problem: Callable[..., SimpleNamespace]
) -> None:
    problem, threat = linear_problem(seed=1, classes=4, shape=(1, 5, 5), n=9), Threat(norm, 0.05)
    run = lambda rows, source: perturb(  # noqa: E731
        problem.model, problem.x[rows], problem.y[rows], threat, steps=2, noise=source
    )
    everyone = list(range(9))
    make = torch.Generator
    assert torch.equal(run(everyone, make().manual_seed(1)), run(everyone, make().manual_seed(1)))
    assert not torch.equal(run(everyone, make().manual_seed(1)), run(everyone, make().manual_seed(2)))
    own = lambda rows: Noise.of(0, "test", rows)  # noqa: E731
    together = run(everyone, own(everyone))
    apart = torch.cat([run(rows, own(rows)) for rows in ([0, 1, 2, 3], [4], [5, 6, 7, 8])])
    torch.testing.assert_close(together, apart)


def test_restarts_only_ever_find_more_and_the_first_fooling_point_is_kept(
    linear_problem: Callable[..., SimpleNamespace],
) -> None:
    problem, threat = linear_problem(seed=2, classes=10, shape=(24,), n=150), Threat("l1", 1.0)
    once, often = (
        pgd(problem.model, problem.x, problem.y, threat, steps=4, restarts=r, noise=torch.Generator().manual_seed(0))
        for r in (1, 6)
    )
    assert often.correct.sum() < once.correct.sum()
    assert not (often.correct & ~once.correct).any()
    fooled = ~once.correct
    assert torch.equal(often.adversarial[fooled], once.adversarial[fooled])


def test_training_restarts_keep_the_higher_loss_and_later_runs_are_random(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    options = {"steps": 1, "step_size": 1e-3, "random_start": False, "noise": torch.Generator().manual_seed(0)}
    once, often = (perturb(small_net, x, y, Threat("l2", 1.0), restarts=r, **options) for r in (1, 4))
    small_net.eval()
    loss = lambda point: nn.functional.cross_entropy(small_net(point), y, reduction="none")  # noqa: E731
    assert (loss(often) >= loss(once)).all()
    assert (loss(often) > loss(once)).any()


def test_the_loss_of_confident_examples_still_has_a_direction() -> None:
    """Gradients near 1e-25 have squares of zero in float32; a step still has its full length."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [-40.0, -20.0, 0.0, 0.0]]))
    x, y = torch.full((1, 4), 0.9), torch.tensor([0])
    point = perturb(model, x, y, Threat("l2", 0.1), steps=1, random_start=False)
    torch.testing.assert_close((x - point).norm(), torch.tensor(0.1))


@pytest.mark.parametrize("norm", NORMS)
def test_more_default_steps_never_find_less_on_an_adversarially_trained_network(
    norm: str, mnist: SimpleNamespace
) -> None:
    """Robust accuracy at 10, 20 and 50 steps; under linf at most half a point above that of as many of APGD."""
    n, threat = 1000 if norm == "linf" else 200, Threat(norm, {"linf": 0.3, "l2": 1.5, "l1": 8.0}[norm])
    x, y = mnist.x[:n], mnist.y[:n]
    noise = Noise.of(0, "steps", range(n))
    with attack_mode(mnist.model):
        accuracies = []
        for steps in (10, 20, 50):
            correct = pgd(mnist.model, x, y, threat, steps=steps, noise=noise).correct
            accuracies.append(correct.double().mean().item())
            if norm == "linf" and steps != 20:
                reference = apgd(mnist.model, x, y, threat, steps=steps, noise=noise).correct
                assert accuracies[-1] <= reference.double().mean().item() + 0.005
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < accuracies[0]


@pytest.mark.parametrize("norm", NORMS)
def test_default_steps_of_an_evaluation_cross_the_ball_however_many_there_are(norm: str) -> None:
    """The first step of 40 is as long as the only one of one."""
    x, y = torch.full((1, 2), 0.5), torch.tensor([0])
    lengths = []

    class Spy(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            lengths.append(torch.linalg.vector_norm((points - x).flatten(1), ord=ORDER[norm]).item())
            return torch.stack([torch.ones(len(points)) - points[:, 0], torch.zeros(len(points))], dim=1)

    for attack in (pgd, lambda model, x, y, ball, **options: msd(model, x, y, {norm: ball}, **options)):
        for steps in (1, 40):
            lengths.clear()
            options = {"random_start": False} if attack is pgd else {}
            attack(Spy(), x, y, Threat(norm, 0.1), steps=steps, sparsity=1, **options)
            first = next(length for length in lengths if length > 0)
            assert first == pytest.approx(0.1, rel=1e-4)
