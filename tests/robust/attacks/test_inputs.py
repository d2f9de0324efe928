"""What an attack is given: images, labels, radii and models that are not what they should be."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks import (
    AttackResult,
    AveragedModel,
    apgd,
    apgd_perturb,
    autoattack,
    cross_entropy,
    fab,
    kl_from,
    msd,
    msd_perturb,
    perturb,
    pgd,
    square,
)
from poise.robust.attacks.losses import LOSSES, dlr, log_odds, targeted_dlr
from poise.robust.attacks.sanity_checks import sanity_warnings
from poise.robust.evaluate import evaluate
from poise.robust.noise import Noise
from poise.robust.objectives.one_step import gradient_cosines
from poise.robust.threats import Threat

LINF = Threat("linf", 0.05)
Attack = Callable[..., AttackResult | Tensor]


def _in_union(attack: Callable[..., Any]) -> Attack:
    def attacked(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, **options: Any) -> AttackResult | Tensor:
        result: AttackResult | Tensor = attack(model, x, y, {threat.norm: threat}, **options)
        return result

    return attacked


EVALUATION: dict[str, tuple[Attack, dict[str, Any]]] = {
    "pgd": (pgd, {"steps": 3}),
    "apgd": (apgd, {"steps": 3}),
    "fab": (fab, {"steps": 3}),
    "msd": (_in_union(msd), {"steps": 3}),
    "square": (square, {"queries": 20}),
}
TRAINING: dict[str, tuple[Attack, dict[str, Any]]] = {
    "perturb": (perturb, {"steps": 3}),
    "apgd_perturb": (apgd_perturb, {"steps": 3}),
    "msd_perturb": (_in_union(msd_perturb), {"steps": 3}),
}
EVERY = {**EVALUATION, **TRAINING}


@pytest.fixture
def linear(linear_problem: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    """60 images of 64 values in float32, ten classes."""
    problem = linear_problem(seed=4, classes=10, shape=(1, 8, 8), n=60)
    return SimpleNamespace(model=problem.model.float(), x=problem.x.float(), y=problem.y)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", ["pgd", "apgd", "msd"])
def test_cross_entropy_does_not_underflow_on_a_confident_model(
    attack: str, norm: str, linear: SimpleNamespace, slack: Callable[..., Tensor]
) -> None:
    """Logits times 10,000 change no class, and so not what stands; the verdict is the closed form of both models."""
    threat = Threat(norm, {"linf": 0.02, "l2": 0.12, "l1": 0.5}[norm])
    run, _ = EVALUATION[attack]
    options = {"steps": 60, "loss": "ce"} if attack == "apgd" else {"steps": 60, "sparsity": 1}
    robust = slack(linear.model.double(), linear.x.double(), linear.y, norm, threat.eps) > 0
    model = linear.model.float()
    standing = []
    for scale in (1.0, 1e4):
        with torch.no_grad():
            model.weight.mul_(scale)
            model.bias.mul_(scale)
        standing.append(run(model, linear.x, linear.y, threat, **options).correct)
    assert 10 < int(robust.sum()) < 50
    assert int((standing[1] ^ robust).sum()) <= int((standing[0] ^ robust).sum()) + 1


def test_log_odds_order_points_like_the_cross_entropy_with_the_same_direction() -> None:
    z = torch.randn(50, 7, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.arange(50) % 7
    values, directions = [], []
    for loss in (cross_entropy, log_odds):
        losses = loss(z, y)
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        values.append(losses.detach())
        directions.append(gradient / gradient.norm(dim=1, keepdim=True))
    torch.testing.assert_close(values[1], values[0].expm1().log())
    torch.testing.assert_close(directions[0], directions[1])


class _Saturated(nn.Module):
    """Logits whose gradient is exactly zero where a tanh is saturated in float32, which is everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        wave = torch.tanh(50 + 50 * x.flatten(1)[:, :1])
        return torch.cat([wave, -wave, 0 * wave], dim=1)


@pytest.mark.parametrize("attack", ["pgd", "apgd", "msd"])
def test_an_attack_that_could_not_move_says_so(attack: str) -> None:
    x, y = torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
    run, options = EVALUATION[attack]
    with pytest.warns(UserWarning, match="5 of 5 examples withstood an attack that could not move"):
        run(_Saturated(), x, y, LINF, **options)
    (sign,) = sanity_warnings(_Saturated(), x, y, ("ce", "dlr"))
    assert "5 of 5 examples have a gradient of exactly zero (cross entropy: 5, DLR: 5)" in sign


class _InPlace(nn.Module):
    """Shifts its input in place, hidden from autograd, as some pre-processing does."""

    def __init__(self, model: nn.Module, hidden: bool) -> None:
        super().__init__()
        self.model, self.hidden = model, hidden

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.hidden):
            x.sub_(0.5)
        return self.model(x)


class _Shifted(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x - 0.5)


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("attack", EVERY)
def test_a_model_that_changes_its_input_is_attacked_like_one_that_does_not(
    attack: str, hidden: bool, linear: SimpleNamespace
) -> None:
    """The images of the caller stay as they are, and the points are those that the tidy model gives."""
    run, options = EVERY[attack]
    x, y = linear.x.clone(), _Shifted(linear.model)(linear.x).argmax(1)
    found = run(_InPlace(linear.model, hidden), x, y, LINF, noise=Noise.of(0, "a", range(60)), **options)
    known = run(_Shifted(linear.model), x, y, LINF, noise=Noise.of(0, "a", range(60)), **options)
    assert torch.equal(x, linear.x)
    for one, other in (
        ((found, known),) if isinstance(found, Tensor) else zip(_fields(found), _fields(known), strict=True)
    ):
        assert torch.equal(one, other)


def _fields(result: Any) -> tuple[Tensor, Tensor]:
    return result.adversarial, result.correct


def test_an_evaluation_leaves_images_as_they_are_for_such_a_model(linear: SimpleNamespace) -> None:
    x = linear.x.clone()
    attacks = {"pgd": lambda model, x, y, noise: pgd(model, x, y, LINF, steps=2, noise=noise)}
    evaluate(_InPlace(linear.model, True), x, linear.y, attacks, batch_size=20)
    autoattack(_InPlace(linear.model, True), x[:4], linear.y[:4], Threat("linf", 0.5))
    sanity_warnings(_InPlace(linear.model, True), x, linear.y)
    assert torch.equal(x, linear.x)


class _TrainedInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm2d(1), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.bn.train()
        return self.head(self.bn(x).flatten(1))


BATCHED = {
    "no statistics": lambda: nn.Sequential(
        nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(36, 5)
    ),
    "trained in forward": _TrainedInForward,
}


@pytest.mark.parametrize("name", BATCHED)
def test_a_model_whose_answer_hangs_on_the_batch_is_named_before_an_evaluation(
    name: str, images: tuple[Tensor, Tensor], small_net: nn.Module
) -> None:
    torch.manual_seed(0)
    x, y = images
    net = BATCHED[name]()
    (sign,) = sanity_warnings(net, x, y)
    assert "answers for one image alone otherwise than for the same image in its batch" in sign
    attacks = {"pgd": lambda model, x, y, noise: pgd(model, x, y, LINF, steps=1, noise=noise)}
    with pytest.warns(UserWarning, match="depends on the batch size"):
        evaluate(net, x, y, attacks, batch_size=6)
    assert sanity_warnings(small_net, x, y) == ()
    randomised = nn.Sequential(nn.Flatten(), _Noisy(36, 5))
    assert ["randomised" in each for each in sanity_warnings(randomised, x, y)] == [True]


class _Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.3 * torch.randn_like(x))


@pytest.mark.parametrize("attack", EVERY)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 8), ("l2", 128), ("l1", 2000)])
def test_a_radius_in_grey_levels_is_refused(attack: str, norm: str, eps: float, linear: SimpleNamespace) -> None:
    run, options = EVERY[attack]
    with pytest.raises(ValueError, match=rf"eps {eps} is more than .* write|eps {eps} is more than .* {eps}/255"):
        run(linear.model, linear.x, linear.y, Threat(norm, eps), **options)


@pytest.mark.parametrize("attack", EVERY)
def test_images_and_labels_that_make_no_sense_are_refused(attack: str, linear: SimpleNamespace) -> None:
    run, options = EVERY[attack]
    x, y = linear.x, linear.y
    for images, labels, message in (
        (255 * x, y, r"example 0 has pixels from .* to 255: scale images to \[0, 1\]"),
        (x - 0.5, y, r"example 0 has pixels from -0.5"),
        (x.half(), y, r"images are float16: .* write x.float\(\)"),
        ((255 * x).byte(), y, r"images are uint8: .* write x.float\(\) / 255"),
        (x, y.float(), "labels are float32"),
        (x, y[:3], r"labels are int64 \(3,\): 60 images need as many"),
        (x, y.unsqueeze(1), r"labels are int64 \(60, 1\)"),
        (x[:0], y[:0], "no examples"),
    ):
        with pytest.raises(ValueError, match=message):
            run(linear.model, images, labels, LINF, **options)
    if attack in EVALUATION:
        with pytest.raises(ValueError, match="example 3 has label 12, but the model has 10 classes"):
            run(linear.model, x, y.index_fill(0, torch.tensor([3]), 12), LINF, **options)


@pytest.mark.parametrize("attack", EVERY)
def test_labels_of_every_integer_type_are_taken(attack: str, linear: SimpleNamespace) -> None:
    run, options = EVERY[attack]
    known = run(linear.model, linear.x, linear.y, LINF, **options)
    for dtype in (torch.uint8, torch.int32):
        found = run(linear.model, linear.x, linear.y.to(dtype), LINF, **options)
        assert torch.equal(*(r if isinstance(r, Tensor) else r.adversarial for r in (found, known)))


class _Masked(nn.Module):
    """Ten classes, of which the last `masked` are impossible."""

    def __init__(self, model: nn.Module, masked: int, fill: float) -> None:
        super().__init__()
        self.model, self.masked, self.fill = model, masked, fill

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        impossible = torch.arange(10) >= 10 - self.masked
        return logits.masked_fill(impossible, self.fill)


@pytest.mark.parametrize("masked", [2, 7])
@pytest.mark.parametrize("attack", [*EVERY, "targeted", "dlr"])
def test_masked_classes_are_no_divergence(attack: str, masked: int, linear: SimpleNamespace) -> None:
    """Logits of -inf are attacked like the same classes at a very low, finite logit."""
    run, options = (apgd, {"steps": 5, "loss": attack}) if attack in ("targeted", "dlr") else EVERY[attack]
    y = _Masked(linear.model, masked, -torch.inf)(linear.x).argmax(1)
    found = run(_Masked(linear.model, masked, -torch.inf), linear.x, y, LINF, **options)
    if not isinstance(found, Tensor):
        known = run(_Masked(linear.model, masked, -60.0), linear.x, y, LINF, **options)
        assert abs(int(found.correct.sum()) - int(known.correct.sum())) <= 1
        found = found.adversarial
    assert found.isfinite().all()


def test_ratios_of_logits_leave_masked_classes_out() -> None:
    z = torch.tensor([[3.0, 1.0, 0.5, -torch.inf, -torch.inf]], requires_grad=True)
    y, t = torch.tensor([0]), torch.tensor([1])
    for loss, value in ((dlr(z, y), -2 / 2.5), (targeted_dlr(z, y, t), -2 / 2.5)):
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert loss.item() == pytest.approx(value)
        assert gradient.isfinite().all()
    assert set(LOSSES) == {"ce", "cw", "dlr"}


class _Rounded(nn.Module):
    """A classifier without a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.detach())


@pytest.mark.parametrize("attack", [name for name in EVERY if name != "square"])
def test_a_model_without_a_gradient_is_said_to_be_one(attack: str, linear: SimpleNamespace) -> None:
    run, options = EVERY[attack]
    with pytest.raises(PoiseError, match=r"no gradient for its input .* square"):
        run(_Rounded(linear.model), linear.x, linear.y, LINF, **options)
    (sign,) = sanity_warnings(_Rounded(linear.model), linear.x, linear.y)
    assert "no gradient for its input" in sign


def test_the_mean_prediction_of_a_randomised_model_is_what_is_attacked(linear: SimpleNamespace) -> None:
    """Of a linear model with noise on its input, one draw in a thousand queries fools by luck: the mean does not."""
    noisy = nn.Sequential(nn.Flatten(), _Noisy(64, 10))
    noisy[1].load_state_dict({"weight": linear.model.weight, "bias": linear.model.bias})
    torch.manual_seed(0)
    x, small = linear.x, Threat("linf", 1e-6)
    y = linear.model(x).argmax(1)
    alone = pgd(noisy, x, y, small, steps=30).correct.double().mean()
    averaged = pgd(AveragedModel(noisy, 50), x, y, small, steps=30).correct.double().mean()
    assert averaged > alone + 0.2
    logits = AveragedModel(linear.model, 3)(x)
    torch.testing.assert_close(logits, linear.model(x).log_softmax(1))
    with pytest.raises(ValueError, match="at least 1"):
        AveragedModel(noisy, 0)


def test_autoattack_rand_finds_what_noise_hides(linear: SimpleNamespace, recwarn: pytest.WarningsRecorder) -> None:
    noisy = nn.Sequential(nn.Flatten(), _Noisy(64, 10))
    noisy[1].load_state_dict({"weight": linear.model.weight, "bias": linear.model.bias})
    torch.manual_seed(0)
    y = linear.model(linear.x).argmax(1)
    result = autoattack(noisy, linear.x[:20], y[:20], Threat("linf", 0.08), version="rand", draws=8)
    assert not [each for each in recwarn if "randomised" in str(each.message)]
    assert result.correct.double().mean() < 0.3


def test_a_model_that_has_diverged_is_no_traceback(linear: SimpleNamespace) -> None:
    """Signs are sought before the first attack, which then names the example."""

    class Diverged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear.model(x) * torch.nan

    sanity_warnings(Diverged(), linear.x, linear.y)
    with pytest.raises(PoiseError, match="example 0 is not finite"):
        pgd(Diverged(), linear.x, linear.y, LINF, steps=1)
    with pytest.raises(PoiseError, match="eps 8 is more than"):  # no traceback in a run either
        perturb(linear.model, linear.x, linear.y, Threat("linf", 8), steps=1)


def test_gradients_of_a_confident_model_have_an_angle() -> None:
    """On a linear model of two classes they never turn; the cross entropy has no gradient at these margins."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[300.0, -200.0, 100.0, 400.0], [0.0, 0.0, 0.0, 0.0]]))
    x, y = torch.full((2, 1, 2, 2), 0.8), torch.zeros(2, dtype=torch.long)
    cosines, angled = gradient_cosines(model, x, x - 0.1, y)
    assert angled.all()
    torch.testing.assert_close(cosines.detach(), torch.ones(2))


@pytest.mark.parametrize("attack", [perturb, apgd_perturb])
def test_the_divergence_of_trades_does_not_underflow_on_a_confident_model(
    attack: Attack, linear: SimpleNamespace
) -> None:
    """Of a linear model with 10,000 times its logits the points change as many answers as of the model itself."""
    x, threat, changed = linear.x, Threat("linf", 0.05), []
    for scale in (1.0, 1e4):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        model.load_state_dict({"1.weight": scale * linear.model.weight, "1.bias": scale * linear.model.bias})
        clean = model(x)
        points = attack(model, x, linear.y, threat, steps=10, loss=kl_from(clean), spread=0.001)
        changed.append(int((model(points).argmax(1) != clean.argmax(1)).sum()))
    assert changed[0] > 20
    assert changed[1] >= changed[0] - 3
