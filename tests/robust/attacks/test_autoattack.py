"""AutoAttack: the order of its stages and who meets them; what the real ones find beside closed forms and a peer."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks.apgd import apgd
from poise.robust.attacks.autoattack import Stage, autoattack, stages, union_attack
from poise.robust.attacks.base import AttackResult
from poise.robust.attacks.fab import fab
from poise.robust.noise import Noise
from poise.robust.threats import Threat

module = importlib.import_module("poise.robust.attacks.autoattack")
THREAT = Threat("linf", 0.25)
STANDARD = stages
BUDGET = {"apgd-ce": {"steps": 20}, "apgd-t": {"steps": 20}, "fab-t": {"steps": 20}, "square": {"queries": 100}}


def _small(threat: Threat, num_classes: int, batch_size: int | None = None) -> tuple[Stage, ...]:
    """The real stages with a budget for tests."""
    return tuple(replace(s, options={**s.options, **BUDGET[s.name]}) for s in STANDARD(threat, num_classes, batch_size))


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "stages", _small)


@pytest.fixture
def silent() -> Iterator[None]:
    """Warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Shade(nn.Module):
    """Images of one grey value, which is the example's own name; the model says 0 for all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([1 + 0.1 * x.flatten(1).mean(1), torch.zeros(len(x)), torch.zeros(len(x))], dim=1)


class StandIn:
    """Fools the examples of these names by making them black, and notes whom it met with which noise."""

    def __init__(self, *victims: int) -> None:
        self.victims, self.met, self.keys = torch.tensor(victims), [], {}

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, noise: Noise) -> AttackResult:
        names = (x[:, 0, 0, 0] * 100).round().long()
        self.met.append(names.tolist())
        self.keys |= dict(zip(names.tolist(), noise.keys.tolist(), strict=True))
        fooled = torch.isin(names, self.victims)
        return AttackResult(torch.where(fooled.view(-1, 1, 1, 1), 0.0, x + 0.001), ~fooled)


def _stand_ins(monkeypatch: pytest.MonkeyPatch, attacks: Mapping[str, StandIn]) -> list[Threat]:
    asked: list[Threat] = []

    def sequence(threat: Threat, num_classes: int, batch_size: int) -> tuple[Stage, ...]:
        assert num_classes == 3
        asked.append(threat)
        return tuple(Stage(name, attack, threat) for name, attack in attacks.items())

    monkeypatch.setattr(module, "stages", sequence)
    return asked


def _shades(n: int) -> tuple[Tensor, Tensor]:
    """Images 1..n in hundredths of grey; the last label is wrong."""
    y = torch.zeros(n, dtype=torch.int64)
    y[-1] = 2
    return (torch.arange(1, n + 1) / 100).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous(), y


def test_each_stage_meets_the_survivors_at_their_original_images(monkeypatch: pytest.MonkeyPatch, silent: None) -> None:
    first, second, third = StandIn(2, 5), StandIn(1, 2, 6), StandIn(3)
    _stand_ins(monkeypatch, {"first": first, "second": second, "third": third})
    x, y = _shades(9)
    kept = x.clone()
    result = autoattack(Shade(), x, y, THREAT, batch_size=4)
    assert first.met == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert second.met == [[1, 3, 4, 6], [7, 8]]  # batches are filled again as examples leave
    assert third.met == [[3, 4, 7, 8]]
    assert result.correct.tolist() == [False, False, False, True, False, False, True, True, False]
    black = torch.tensor([1, 2, 3, 5, 6]) - 1
    assert torch.equal(result.adversarial, kept.index_fill(0, black, 0.0))
    assert torch.equal(x, kept)


def test_nobody_left_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone, nobody = StandIn(*range(9)), StandIn()
    _stand_ins(monkeypatch, {"first": everyone, "second": nobody})
    x, y = _shades(5)
    assert not autoattack(Shade(), x, y, THREAT).correct.any()
    assert nobody.met == []
    wrong = torch.ones_like(y)
    assert torch.equal(autoattack(Shade(), x, wrong, THREAT).adversarial, x)
    assert everyone.met == [[1, 2, 3, 4]]


def test_the_noise_of_an_example_hangs_on_its_stage_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _shades(9)
    noise = Noise.of(3, "test", range(9))
    runs = []
    for batch_size, victims in ((9, ()), (2, (1, 4, 6))):
        first, second = StandIn(*victims), StandIn()
        _stand_ins(monkeypatch, {"first": first, "second": second})
        autoattack(Shade(), x, y, THREAT, noise=noise, batch_size=batch_size)
        runs.append((first.keys, second.keys))
    (all_first, all_second), (same_first, some_second) = runs
    assert all_first == same_first
    assert some_second == {name: all_second[name] for name in (2, 3, 5, 7, 8)}
    assert len({*all_first.values(), *all_second.values()}) == 16


def test_a_union_attacks_under_each_threat_what_stands_under_those_before(
    monkeypatch: pytest.MonkeyPatch, silent: None
) -> None:
    class ByNorm(StandIn):
        def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, noise: Noise) -> AttackResult:
            self.victims = torch.tensor({"linf": [2, 5], "l2": [2, 3], "l1": [8]}[threat.norm])
            return super().__call__(model, x, y, threat, noise=noise)

    attack = ByNorm()
    threats = {"a": Threat("linf", 0.1), "b": Threat("l2", 1.0), "c": Threat("l1", 2.0)}
    asked = _stand_ins(monkeypatch, {"only": attack})
    x, y = _shades(9)
    result = union_attack(Shade(), x, y, threats, batch_size=20)
    assert asked == list(threats.values())
    assert attack.met == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 3, 4, 6, 7, 8], [1, 4, 6, 7, 8]]
    assert result.names == ("a", "b", "c")
    stand = [{1, 3, 4, 6, 7, 8}, {1, 4, 6, 7, 8}, {1, 4, 6, 7}]
    assert [{i + 1 for i in column.nonzero().flatten().tolist()} for column in result.robust.T] == stand
    assert result.correct.tolist() == [i + 1 in stand[-1] for i in range(9)]
    assert torch.equal(result.adversarial, x.index_fill(0, torch.tensor([2, 3, 5, 8]) - 1, 0.0))
    with pytest.raises(ValueError, match="at least one"):
        union_attack(Shade(), x, y, {})


def test_warnings_before_and_after_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_ins(monkeypatch, {"first": StandIn(2), "square": StandIn(3)})
    x, y = _shades(9)
    with pytest.warns(UserWarning, match="Square, which sees no gradient, fooled 1 of 9 examples"):
        autoattack(Shade(), x, y, THREAT)
    _stand_ins(monkeypatch, {"first": StandIn(2)})
    with pytest.warns(UserWarning, match="remove the softmax"):
        autoattack(nn.Sequential(Shade(), nn.Softmax(dim=1)), x, y, THREAT)


def test_what_cannot_be_attacked_is_refused() -> None:
    x, y = _shades(4)
    bad = x.clone()
    bad[2, 0, 0, 0] = 1.5
    for attack in (lambda *a: autoattack(*a, THREAT), lambda *a: union_attack(*a, {"linf": THREAT})):
        with pytest.raises(ValueError, match=r"example 2 has pixels from .* to 1.5"):
            attack(Shade(), bad, y)
        with pytest.raises(ValueError, match="example 1 has label 3, but the model has 3 classes"):
            attack(Shade(), x, torch.tensor([0, 3, 0, 0]))
    with pytest.raises(ValueError, match=r"'fast'.*'standard' or 'rand'"):
        autoattack(Shade(), x, y, THREAT, version="fast")
    with pytest.raises(PoiseError, match="example 0 is not finite"):
        autoattack(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Threshold(1e9, torch.nan)), x, y, THREAT)


def test_the_standard_stages_as_data() -> None:
    for norm, restarts, targets in (("linf", 1, 9), ("l2", 1, 9), ("l1", 5, 5)):
        threat = Threat(norm, 1.0)
        ce, targeted, boundary, square = stages(threat, 10)
        assert [s.name for s in (ce, targeted, boundary, square)] == ["apgd-ce", "apgd-t", "fab-t", "square"]
        assert {s.threat for s in (ce, targeted, boundary, square)} == {threat}
        assert ce.options == {"loss": "ce", "steps": 100, "restarts": restarts}
        assert targeted.options == {"loss": "targeted", "steps": 100, "targets": targets}
        assert boundary.options == {"steps": 100, "targets": 9}
        assert square.options == {"queries": 5000}
    for classes in (2, 3, 4):
        assert [s.options.get("targets") for s in stages(THREAT, classes)] == [None, classes - 1, classes - 1, None]
    with pytest.raises(ValueError, match="at least 2 classes"):
        stages(THREAT, 1)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_runs_side_by_side_find_what_they_find_one_by_one(
    norm: str, linear_problem: Callable[..., SimpleNamespace]
) -> None:
    """Restarts and targets, each example with the noise of its own run; radii at which the first run misses some."""
    problem = linear_problem(seed=4, classes=6, shape=(1, 5, 5), n=40)
    threat, noise = Threat(norm, {"linf": 0.05, "l1": 0.7}[norm]), Noise.of(1, "test", range(40))
    for attack, options in (
        (apgd, {"loss": "ce", "steps": 4, "restarts": 5}),
        (apgd, {"loss": "targeted", "steps": 4, "restarts": 2}),
        (fab, {"steps": 2, "restarts": 2}),
    ):
        run = partial(attack, problem.model, problem.x, problem.y, threat, noise=noise, **options)
        alone, side_by_side = run(), [run(batch_size=size) for size in (100, 1000)]
        assert 2 < int(alone.correct.sum()) < 38
        for result in side_by_side:
            assert torch.equal(result.correct, alone.correct)
            assert torch.allclose(result.adversarial, alone.adversarial, rtol=0, atol=1e-12)


RADII = {"linf": 0.03, "l2": 0.16, "l1": 0.6}


@pytest.mark.parametrize("norm", RADII)
def test_on_a_linear_model_the_verdict_is_the_closed_form(
    norm: str, linear_problem: Callable[..., SimpleNamespace], slack: Callable[..., Tensor], small_budget: None
) -> None:
    problem = linear_problem(seed=4, classes=6, shape=(3, 8, 8), n=32)
    threat = Threat(norm, RADII[norm])
    room = slack(problem.model, problem.x, problem.y, norm, threat.eps)
    result = autoattack(problem.model, problem.x, problem.y, threat)
    right = problem.model(problem.x).argmax(1) == problem.y
    assert torch.equal(result.correct, right & (room > 0))
    assert 4 < int(result.correct.sum()) < 28
    assert torch.equal(problem.model(result.adversarial).argmax(1) == problem.y, result.correct)
    _feasible(problem.x, result.adversarial, threat)


@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_few_and_many_classes(
    classes: int, linear_problem: Callable[..., SimpleNamespace], slack: Callable[..., Tensor], small_budget: None
) -> None:
    problem = linear_problem(seed=1, classes=classes, shape=(1, 4, 4), n=8)
    threat = Threat("linf", 0.05)
    room = slack(problem.model, problem.x, problem.y, "linf", threat.eps)
    assert torch.equal(autoattack(problem.model, problem.x, problem.y, threat).correct, room > 0)


@pytest.mark.parametrize("norm", RADII)
def test_constant_models_radius_zero_and_one_example(
    norm: str, small_net: nn.Module, images: tuple[Tensor, Tensor], small_budget: None
) -> None:
    x, _ = images
    constant = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    nn.init.zeros_(constant[1].weight)
    y = constant(x).argmax(1)
    with pytest.warns(UserWarning, match="12 of 12 examples have a gradient of exactly zero"):
        assert autoattack(constant, x, y, Threat(norm, 0.2)).correct.all()
    y = small_net.eval()(x).argmax(1)
    result = autoattack(small_net, x, y, Threat(norm, 0.0))
    assert result.correct.all()
    assert torch.equal(result.adversarial, x)
    assert autoattack(small_net, x[:1], y[:1], Threat(norm, 0.01)).correct.shape == (1,)


def test_the_contract_of_an_attack(small_net: nn.Module, images: tuple[Tensor, Tensor], small_budget: None) -> None:
    before = {name: value.clone() for name, value in small_net.state_dict().items()}
    random = torch.get_rng_state()
    autoattack(small_net, *images, Threat("l2", 0.5))
    assert all(module.training for module in small_net.modules())
    assert all(torch.equal(value, before[name]) for name, value in small_net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in small_net.parameters())
    assert torch.equal(torch.get_rng_state(), random)


MNIST = {"linf": 0.3, "l2": 1.0, "l1": 3.0}


@pytest.mark.filterwarnings("ignore:Square")
@pytest.mark.parametrize("norm", MNIST)
def test_beside_pyautoattack_on_a_robust_network(norm: str, mnist: SimpleNamespace, small_budget: None) -> None:
    """On 40 images with the same reduced budget, by means over seeds, never more than one stands that does not there.

    Of one seed each, chance alone decides under l1: two of the peer's differ on one image in seven.
    """
    x, y, threat = mnist.x[110:150], mnist.y[110:150], Threat(norm, MNIST[norm])
    seeds = range(3) if norm == "l1" else range(1)
    ours = [autoattack(mnist.model, x, y, threat, noise=Noise.of(seed, "test", list(range(40)))) for seed in seeds]
    for each in ours:
        _feasible(x, each.adversarial, threat)
    theirs = [_peer(mnist.model, x, y, threat, seed) for seed in seeds]
    num_robust = lambda found: sum(int(each.sum()) for each in found) / len(found)  # noqa: E731
    assert num_robust([each.correct for each in ours]) <= num_robust(theirs) + 1
    assert int((~ours[0].correct).sum()) > 2


def _peer(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Tensor:
    """Which of the examples stand under pyautoattack."""
    attacks = pyautoattack.AutoAttack(model, norm=threat.norm.capitalize(), eps=threat.eps, seed=seed)
    for attack in (attacks.apgd, attacks.apgd_targeted, attacks.fab):
        attack.n_iter = attack.n_iter_orig = 20
    attacks.square.n_queries = 100
    adversarial, _ = attacks.run_standard_evaluation(x, y)
    return model(adversarial).argmax(1) == y


def _feasible(x: Tensor, adversarial: Tensor, threat: Threat) -> None:
    delta = (adversarial - x).flatten(1)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm]
    assert torch.linalg.vector_norm(delta, ord=order, dim=1).max() <= threat.eps * (1 + 1e-5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
