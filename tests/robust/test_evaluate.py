"""Union accuracy as a logical AND per example, and evaluation that does not depend on how it is batched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from poise.robust.attacks import pgd
from poise.robust.evaluate import Evaluation, EvaluationAttack, evaluate, union_accuracy
from poise.robust.noise import Noise
from poise.robust.threats import Threat

EPS = {"linf": 0.03, "l2": 0.16, "l1": 0.3}


def _attack(norm: str, eps: float, **options: object) -> EvaluationAttack:
    threat = Threat(norm, eps)
    return lambda model, x, y, noise: pgd(model, x, y, threat, noise=noise, **options)


def test_union_is_the_and_of_the_columns() -> None:
    correct = torch.tensor([[True, True], [True, False], [False, True], [False, False], [True, True]])
    assert union_accuracy(correct) == 2 / 5
    assert union_accuracy(correct[:, :1]) == 3 / 5
    assert union_accuracy(correct.numpy()) == 2 / 5


@pytest.mark.parametrize("matrix", [torch.zeros(0, 2, dtype=torch.bool), torch.ones(3, 2), torch.ones(3, dtype=bool)])
def test_union_of_nothing_or_of_numbers_is_refused(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="bool matrix"):
        union_accuracy(matrix)


def test_evaluation_of_a_linear_model_is_the_and_of_the_closed_forms(
    linear_problem: Callable[..., SimpleNamespace], slack: Callable[..., Tensor]
) -> None:
    problem = linear_problem(seed=5, classes=4, shape=(3, 8, 8), n=64, sparse=True)
    problem.y[:10] = (problem.y[:10] + 1) % 4
    attacks = {
        norm: _attack(norm, eps, steps=100, step_size=eps / 20, restarts=3, sparsity=1) for norm, eps in EPS.items()
    }
    result = evaluate(problem.model, problem.x, problem.y, attacks, batch_size=25)
    clean = problem.model(problem.x).argmax(1) == problem.y
    robust = [slack(problem.model, problem.x, problem.y, norm, eps) > 0 for norm, eps in EPS.items()]
    assert result.names == ("clean", "linf", "l2", "l1")
    assert torch.equal(result.correct, torch.stack([clean, *robust], dim=1))
    union = torch.stack(robust).all(0).double().mean().item()
    shares = [column.double().mean().item() for column in robust]
    assert result.union == union < min(shares) - 0.04
    assert union >= 1 - sum(1 - share for share in shares)
    assert result.summary() == pytest.approx(
        {
            "clean": clean.double().mean().item(),
            **{f"robust/{norm}": share for norm, share in zip(EPS, shares, strict=True)},
            "robust/average": sum(shares) / 3,
            "robust/union": union,
        }
    )


def test_the_result_depends_on_neither_batches_nor_shards_nor_the_other_attacks(
    linear_problem: Callable[..., SimpleNamespace],
) -> None:
    """Radii and steps at which many examples hang on the noise, as the other seed shows."""
    problem = linear_problem(seed=3, classes=10, shape=(20,), n=120)
    attacks = {norm: _attack(norm, eps, steps=2, restarts=2) for norm, eps in {"l2": 0.6, "l1": 1.0}.items()}
    run = partial(evaluate, problem.model)
    whole = run(problem.x, problem.y, attacks, batch_size=120).correct
    assert torch.equal(whole, run(problem.x, problem.y, attacks, batch_size=7).correct)
    assert not torch.equal(whole, run(problem.x, problem.y, attacks, batch_size=120, seed=1).correct)
    alone = run(problem.x, problem.y, {"l1": attacks["l1"]}, batch_size=32).correct
    assert torch.equal(whole[:, [0, 2]], alone)
    for rank in range(3):
        indices = range(rank, 120, 3)
        shard = run(problem.x[rank::3], problem.y[rank::3], attacks, batch_size=16, indices=indices)
        assert torch.equal(shard.correct, whole[rank::3])


def test_every_attack_starts_from_the_original_images_that_the_model_gets_right(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, _ = images
    small_net.eval()
    y = small_net(x).argmax(1)
    y[::3] = (y[::3] + 1) % 5
    right = [i for i in range(12) if i % 3]
    seen: list[Tensor] = []

    def spy(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> object:
        assert not any(module.training for module in model.modules())
        seen.append(x)
        return SimpleNamespace(adversarial=torch.zeros_like(x), correct=torch.ones_like(y, dtype=torch.bool))

    small_net.train()
    result = evaluate(small_net, x, y, {"a": spy, "b": spy}, batch_size=5)
    assert all(module.training for module in small_net.modules())
    assert torch.equal(torch.cat(seen), x[right + right])
    assert result.correct.all(1).tolist() == [i in right for i in range(12)]


def test_a_model_that_is_never_right_is_not_attacked(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, _ = images
    small_net.eval()
    result = evaluate(small_net, x, (small_net(x).argmax(1) + 1) % 5, {"l2": _attack("l2", 1.0, steps=2)}, batch_size=5)
    assert result.summary() == {"clean": 0.0, "robust/l2": 0.0, "robust/average": 0.0, "robust/union": 0.0}


def test_no_attack_is_an_error(small_net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="at least one attack"):
        evaluate(small_net, *images, {}, batch_size=4)
    with pytest.raises(ValueError):
        Evaluation(("clean", "l2"), torch.ones(2, 2, dtype=torch.bool)).accuracy("l1")
