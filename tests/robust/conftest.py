"""Oracles for robust training: what an optimal adversary does to a linear model inside the box, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from poise.data.images.readers import idx
from poise.robust.attacks import AttackResult, cw_loss
from poise.robust.threats import ORDERS, Threat


def _gain_linf(g: Tensor, room: Tensor, eps: float) -> Tensor:
    return (g.abs() * room.clamp(max=eps)).sum(1)


def _gain_l1(g: Tensor, room: Tensor, eps: float) -> Tensor:
    """Greedy: spend the budget on the largest |g| first, each up to its room."""
    order = g.abs().argsort(dim=1, descending=True)
    g, room = g.abs().gather(1, order), room.gather(1, order)
    left = (eps - (room.cumsum(1) - room)).clamp(min=0)
    return (g * torch.minimum(room, left)).sum(1)


def _gain_l2(g: Tensor, room: Tensor, eps: float) -> Tensor:
    """delta = min(t |g|, room) with t found by bisection so that ||delta|| = eps."""
    low, high = torch.zeros(len(g), 1, dtype=g.dtype), torch.full((len(g), 1), 1e9, dtype=g.dtype)
    for _ in range(200):
        t = (low + high) / 2
        long = torch.minimum(t * g.abs(), room).norm(dim=1, keepdim=True) > eps
        low, high = torch.where(long, low, t), torch.where(long, t, high)
    return (g.abs() * torch.minimum(low * g.abs(), room)).sum(1)


_GAINS = {"linf": _gain_linf, "l2": _gain_l2, "l1": _gain_l1}


def _slack(model: nn.Linear, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    """min over classes j != y of margin_j minus the most that delta can gain on it; robust exactly where positive."""
    x, logits = x.flatten(1), model(x.flatten(1)).detach()
    slack = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for j in range(logits.shape[1]):
        g = (model.weight[j] - model.weight[y]).detach()
        room = torch.where(g > 0, 1 - x, x)
        margin = logits.gather(1, y[:, None]).squeeze(1) - logits[:, j]
        slack = torch.where(y == j, slack, torch.minimum(slack, margin - _GAINS[norm](g, room, eps)))
    return slack


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


class _Kinked(nn.Module):
    """Adds the distance to an image, whose slope there is 0 / 0, to the first logit."""

    def __init__(self, net: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.net, self.image = net, image

    def forward(self, x: Tensor) -> Tensor:
        distance = (x - self.image).flatten(1).square().sum(1).sqrt()
        return self.net(x) + 1e-6 * nn.functional.pad(distance[:, None], (0, 4))


@pytest.fixture(scope="session")
def kinked() -> Callable[[nn.Module, Tensor], nn.Module]:
    """A network and an image at which its gradient is not a number, though its logits are finite."""
    return _Kinked


@pytest.fixture(scope="session")
def slack() -> Callable[..., Tensor]:
    return _slack


@pytest.fixture(scope="session")
def linear_problem() -> Callable[..., SimpleNamespace]:
    """A random linear model that is mostly right on random images, some pixels of which stand at the box's sides.

    With `sparse`, the weights of every class but the first are zero beyond their first eight pixels, and larger there:
    some margins are then weak to l1 and others to linf.
    """

    def make(seed: int, classes: int, shape: tuple[int, ...], n: int, *, sparse: bool = False) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(seed)
        d = int(torch.tensor(shape).prod())
        model = _Linear(d, classes).double()
        with torch.no_grad():
            model.weight.copy_(torch.randn(classes, d, generator=generator, dtype=torch.double))
            model.bias.copy_(torch.randn(classes, generator=generator, dtype=torch.double))
            if sparse:
                model.weight[1:] *= (d / 8) ** 0.5 * (torch.arange(d) < 8)
        x = (0.5 + 0.5 * torch.randn(n, *shape, generator=generator, dtype=torch.double)).clamp(0, 1)
        scores = model(x).detach()
        scores = scores + 0.3 * scores.std() * torch.randn(scores.shape, generator=generator, dtype=torch.double)
        return SimpleNamespace(model=model, x=x, y=scores.argmax(1))

    return make


Attack = Callable[[nn.Module, Tensor, Tensor, Threat], AttackResult]


@pytest.fixture(scope="session")
def assert_closed_form(
    linear_problem: Callable[..., SimpleNamespace], slack: Callable[..., Tensor]
) -> Callable[..., None]:
    """An attack on a boxed linear model of ten classes is right about every example, whatever its share is robust."""

    def check(attack: Attack, threat: Threat, seed: int, n: int, share: tuple[float, float]) -> None:
        problem = linear_problem(seed=seed, classes=10, shape=(3, 8, 8), n=n)
        robust = slack(problem.model, problem.x, problem.y, threat.norm, threat.eps) > 0
        result = attack(problem.model, problem.x, problem.y, threat)
        assert torch.equal(result.correct, robust)
        assert torch.equal(problem.model(result.adversarial).argmax(1) == problem.y, robust)
        delta = (result.adversarial - problem.x).flatten(1)
        assert (torch.linalg.vector_norm(delta, ORDERS[threat.norm], dim=1) <= threat.eps * (1 + 1e-9)).all()
        assert share[0] < robust.double().mean() < share[1]

    return check


@pytest.fixture(scope="session")
def assert_exact_between_two_classes(
    linear_problem: Callable[..., SimpleNamespace], slack: Callable[..., Tensor]
) -> Callable[..., None]:
    """An attack on a boxed linear model of two classes fools no example that is robust.

    It fools every other one, but for those whose margin it would have to lower by more than 1 - `tolerance` of what an
    optimal adversary can. The radius is `share` of the one that reaches across the box.
    """

    def check(attack: Attack, norm: str, seed: int, share: float, tolerance: float) -> None:
        d = 12
        eps = share * {"linf": 0.5, "l2": 0.5 * math.sqrt(d), "l1": 0.5 * d}[norm]
        problem = linear_problem(seed=seed, classes=2, shape=(d,), n=20)
        exact = slack(problem.model, problem.x, problem.y, norm, eps)
        gain = slack(problem.model, problem.x, problem.y, norm, 0.0) - exact
        correct = attack(problem.model, problem.x, problem.y, Threat(norm, eps)).correct
        assert correct[exact > 0].all()
        assert not correct[exact < -tolerance * gain].any()

    return check


@pytest.fixture(scope="session")
def assert_one_step_is_exact(linear_problem: Callable[..., SimpleNamespace]) -> Callable[..., None]:
    """A step of length eps away from the box lowers a binary margin by eps times the dual norm of its slope."""

    def check(point_of: Callable[[nn.Module, Tensor, Tensor, Threat], Tensor], norm: str) -> None:
        problem, eps = linear_problem(seed=5, classes=2, shape=(20,), n=30), 0.05
        x = 0.3 + 0.4 * problem.x
        point = point_of(problem.model, x, problem.y, Threat(norm, eps))
        drop = (cw_loss(problem.model(point), problem.y) - cw_loss(problem.model(x), problem.y)).detach()
        dual = {"linf": 1, "l2": 2, "l1": math.inf}[norm]
        slope = torch.linalg.vector_norm(problem.model.weight[0] - problem.model.weight[1], ord=dual).detach()
        torch.testing.assert_close(drop, (eps * slope).expand(30))

    return check


@pytest.fixture
def small_net() -> nn.Module:
    """Conv, BN and dropout on (N, 1, 6, 6) images, five classes; in train mode, BN buffers not at their defaults."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 5)
    )
    net(torch.rand(16, 1, 6, 6))
    return net


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 1, 6, 6, generator=generator)
    return x, torch.randint(0, 5, (12,), generator=generator)


def _mnist(shared_data: Path) -> SimpleNamespace:
    images, classifiers = shared_data / "images" / "mnist", shared_data / "classifiers"
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 5, 2, 2), nn.ReLU(), nn.Conv2d(4, 8, 5, 2, 2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(392, 128), nn.ReLU(), nn.Linear(128, 10)),
    ).eval()
    model.load_state_dict(load_file(classifiers / "mnist_madrycnn_no_maxpool_tiny.safetensors"))
    x = torch.tensor(idx((images / "t10k-images-idx3-ubyte.gz").read_bytes(), 3)[:1000, None]) / 255
    y = torch.tensor(idx((images / "t10k-labels-idx1-ubyte.gz").read_bytes(), 1)[:1000]).long()
    return SimpleNamespace(model=model, x=x, y=y)


@pytest.fixture(scope="session")
def mnist(shared_data: Path) -> SimpleNamespace:
    """The adversarially trained network `model` (linf 0.3) and the first 1,000 test images `x` and labels `y`."""
    return _mnist(shared_data)
