"""Objectives against hand computation, and against each other where they must agree."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from doctest import DocTestParser
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from poise.errors import PoiseError
from poise.robust.attacks import perturb
from poise.robust.objectives import OBJECTIVES, Objective, ObjectiveContext, ObjectiveOutput, State, adt_weights, base
from poise.robust.objectives.adt import Adt
from poise.robust.objectives.at import At
from poise.robust.objectives.avg import Avg
from poise.robust.objectives.max import Max
from poise.robust.objectives.msd import Msd
from poise.robust.objectives.ramp import Ramp
from poise.robust.threats import Threat

NORMS = ("linf", "l2", "l1")
EPS = {"linf": 0.1, "l2": 0.5, "l1": 2.0}
OPTIONS: dict[str, Objective] = {name: objective() for name, objective in OBJECTIVES.items()}
OPTIONS |= {"msd": Msd(steps=2), "ramp": Ramp(projection=None)}
WANTED = {"at": 1, "trades": 1, "mart": 1, "fgsm_rs": 1, "gradalign": 1, "ramp": 2}
THIRDS = torch.full((3,), 1 / 3)


class _Bound(partial[Tensor]):
    @property
    def threat(self) -> Threat:
        return self.keywords["threat"]


def _attacks(*norms: str) -> dict[str, Callable[..., Tensor]]:
    return {norm: _Bound(perturb, threat=Threat(norm, EPS[norm]), steps=2, random_start=False) for norm in norms}


class _Table(nn.Module):
    """Losses by decree: an image holds a number, its loss for label 0 is scale * number, scale being the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        loss = self.scale * x.view(-1, 1)
        return torch.cat([torch.zeros_like(loss), torch.log(torch.expm1(loss))], dim=1)


def _decree(losses: dict[str, Any]) -> dict[str, Callable[..., Tensor]]:
    return {
        n: lambda model, x, y, v=v: torch.as_tensor(v, dtype=torch.double).expand(len(x)) for n, v in losses.items()
    }


def _output(
    objective: Objective, model: nn.Module, batch: tuple[Tensor, Tensor], attacks: Any, state: State, **more: Any
) -> ObjectiveOutput:
    context = ObjectiveContext(model, *batch, attacks, state, **more)
    return objective.loss(objective.craft(context), context)


def _run(objective: Objective, losses: dict[str, Any], state: State, n: int = 1, **more: Any) -> ObjectiveOutput:
    batch = torch.zeros(n, dtype=torch.double), torch.zeros(n, dtype=torch.long)
    return _output(objective, _Table(), batch, _decree(losses), state, **more)


@pytest.mark.parametrize(
    ("weighting", "l1", "l2", "linf"),
    [
        ("inverse_loss", 4 / 7, 2 / 7, 1 / 7),
        ("proportional_loss", 1 / 7, 2 / 7, 4 / 7),
        ("uniform", 1 / 3, 1 / 3, 1 / 3),
        ("official_slip", 1 / 7, 2 / 7, 1 / 3),
    ],
)
def test_the_weight_table_of_the_page(weighting: str, l1: float, l2: float, linf: float) -> None:
    """Losses (1, 2, 4) for (l1, l2, linf), whatever the order of the threats; the official slip sums to 16/21."""
    for norms in (NORMS, NORMS[::-1]):
        losses = torch.tensor([{"l1": 1.0, "l2": 2.0, "linf": 4.0}[norm] for norm in norms])
        expected = torch.tensor([{"l1": l1, "l2": l2, "linf": linf}[norm] for norm in norms])
        weights = adt_weights(losses, weighting, norms)
        torch.testing.assert_close(weights, expected)
        assert weights.sum().item() == pytest.approx(16 / 21 if weighting == "official_slip" else 1)


def test_a_loss_of_zero_is_floored() -> None:
    torch.testing.assert_close(
        adt_weights(torch.tensor([0.0, 1e-3]), "inverse_loss", ("l2", "l1"), 1e-3), THIRDS[:2] * 1.5
    )


def test_the_loss_is_the_weighted_sum_and_the_weights_are_constants() -> None:
    """Losses 4, 2, 1, inverse weights 1/7, 2/7, 4/7: the sum is 12/7, and so is its derivative in the scale."""
    objective = Adt(lag=0)
    batch, model = (torch.zeros(1, dtype=torch.double), torch.zeros(1, dtype=torch.long)), _Table()
    attacks = _decree({"linf": 4.0, "l2": 2.0, "l1": 1.0})
    out = _output(objective, model, batch, attacks, objective.initial_state(NORMS))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(12 / 7)
    assert model.scale.grad.item() == pytest.approx(12 / 7)
    assert {name: value.item() for name, value in out.metrics.items() if "weight" in name} == pytest.approx(
        {"weight/linf": 1 / 7, "weight/l2": 2 / 7, "weight/l1": 4 / 7}
    )
    assert not any(value.requires_grad for value in (*out.metrics.values(), *out.state.values()))


@pytest.mark.parametrize("reset", ["epoch", "never"])
@pytest.mark.parametrize("lag", [0, 1])
def test_lag_and_reset(lag: int, reset: str) -> None:
    objective = Adt(lag=lag, reset=reset)
    batches = [
        ({"linf": 4.0, "l2": 2.0, "l1": 1.0}, True),
        ({"linf": 1.0, "l2": 1.0, "l1": 2.0}, False),
        ({"linf": 3.0, "l2": 3.0, "l1": 1.0}, True),
    ]
    own = [torch.tensor(w) for w in ([1 / 7, 2 / 7, 4 / 7], [0.4, 0.4, 0.2], [0.2, 0.2, 0.6])]
    expected = own if lag == 0 else [THIRDS, own[0], THIRDS if reset == "epoch" else own[1]]
    state = objective.initial_state(NORMS)
    for (losses, first), weights in zip(batches, expected, strict=True):
        kept = {name: value.clone() for name, value in state.items()}
        out = _run(objective, losses, state, first_in_epoch=first)
        used = torch.stack([out.metrics[f"weight/{norm}"] for norm in NORMS])
        torch.testing.assert_close(used.float(), weights)
        assert out.loss.item() == pytest.approx(
            sum(w.item() * loss for w, loss in zip(weights, losses.values(), strict=True))
        )
        assert all(torch.equal(kept[name], state[name]) for name in kept)  # the old state is not written to
        state = out.state


@pytest.mark.parametrize("weighting", ["inverse_loss", "proportional_loss", "smoothness", "uniform"])
def test_equal_losses_are_those_of_avg(weighting: str) -> None:
    objective, losses = Adt(weighting=weighting, lag=0), dict.fromkeys(NORMS, 1.7)
    assert _run(objective, losses, objective.initial_state(NORMS)).loss.item() == pytest.approx(1.7)
    assert _run(Avg(), losses, {}).loss.item() == pytest.approx(1.7)


def test_avg_is_the_mean_and_max_the_worst_of_each_example() -> None:
    losses = {"linf": [1.0, 5.0, 2.0, 2.0], "l2": [3.0, 1.0, 2.5, 2.5], "l1": [2.0, 2.0, 1.0, 1.0]}
    assert _run(Avg(), losses, {}, n=4).loss.item() == pytest.approx(25 / 12)
    worst = _run(Max(), losses, {}, n=4)
    assert worst.loss.item() == pytest.approx((3 + 5 + 2.5 + 2.5) / 4)
    assert [worst.metrics[f"weight/{norm}"].item() for norm in NORMS] == [0.25, 0.75, 0.0]
    assert worst.metrics["loss/l2"].item() == pytest.approx(9 / 4)


def test_avg_with_weights_is_their_sum_and_equal_ones_are_the_mean() -> None:
    losses = {"linf": [1.0, 5.0], "l2": [3.0, 1.0], "l1": [2.0, 2.5]}
    weighted = _run(Avg(weights={"l1": "1/2", "linf": "1/2", "l2": 0}), losses, {}, n=2)
    assert weighted.loss.item() == pytest.approx((3.0 + 2.25) / 2)
    assert [weighted.metrics[f"weight/{norm}"].item() for norm in NORMS] == [0.5, 0.0, 0.5]
    thirds = _run(Avg(weights=dict.fromkeys(NORMS, "1/3")), losses, {}, n=2)
    assert thirds.loss.item() == pytest.approx(_run(Avg(), losses, {}, n=2).loss.item())


def test_weights_follow_the_mean_over_ranks() -> None:
    """Two ranks with different losses hold the same weights once `mean` has averaged."""
    objective, everywhere = Adt(lag=0), torch.tensor([4.0, 2.0, 1.0], dtype=torch.double)
    out = _run(objective, dict.fromkeys(NORMS, 9.0), objective.initial_state(NORMS), mean=lambda _: everywhere)
    torch.testing.assert_close(out.state["weights"].float(), torch.tensor([1 / 7, 2 / 7, 4 / 7]))
    assert out.loss.item() == pytest.approx(9.0)


def test_smoothness_weighs_by_the_inverse_moving_average_of_the_gradients_change() -> None:
    """For `_Table` the gradient of l_p is its number: changes (1, 4), then (3, 0), averaged with decay 1/2."""
    objective = Adt(weighting="smoothness", lag=0, smoothness_decay=0.5)
    state = objective.initial_state(("linf", "l1"))
    seen = []
    for linf, l1 in [(1.0, 1.0), (2.0, 5.0), (5.0, 5.0)]:
        out = _run(objective, {"linf": linf, "l1": l1}, state)
        out.loss.backward()
        state = out.state
        seen.append([out.metrics["weight/linf"].item(), out.metrics["weight/l1"].item()])
    assert seen[0] == pytest.approx([1 / 2, 1 / 2])
    assert seen[1] == pytest.approx([4 / 5, 1 / 5], rel=1e-5)
    assert state["roughness"].tolist() == pytest.approx([2, 2], rel=1e-5)
    assert seen[2] == pytest.approx([1 / 2, 1 / 2], rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["avg", "max", "adt", "sat", "mix", "eat", "sequential"])
def test_with_one_threat_every_objective_is_at(
    name: str, norm: str, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    """Losses, gradients and BN buffers, bit for bit, over two batches."""
    results = []
    for objective in (At(), OPTIONS.get(name, Avg(mode="sequential"))):
        net = copy.deepcopy(small_net)
        state, losses = objective.initial_state((norm,)), []
        torch.manual_seed(5)
        for first in (True, False):
            more = {"step": len(losses), "first_in_epoch": first, "draw": 0.7}
            out = _output(objective, net, images, _attacks(norm), state, **more)
            out.loss.backward()
            state = out.state
            losses.append(out.loss.detach())
        results.append([*losses, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["avg", "max", "adt"])
def test_losses_are_those_of_training_forwards_one_per_threat(
    name: str, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    """BN statistics per threat: the batch mean of each forward is its own, and its buffers move three times."""
    small_net[3].p = 0.0
    x, y = images
    plain, objective = copy.deepcopy(small_net), OPTIONS[name]
    out = _output(objective, small_net, images, _attacks(*NORMS), objective.initial_state(NORMS))
    points = [attack(plain, x, y) for attack in _attacks(*NORMS).values()]
    losses = torch.stack([nn.functional.cross_entropy(plain(point), y, reduction="none") for point in points])
    expected = losses.amax(0).mean() if name == "max" else losses.mean()
    torch.testing.assert_close(out.loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(small_net.buffers(), plain.buffers(), strict=True))
    for norm, own in zip(NORMS, losses, strict=True):
        torch.testing.assert_close(out.metrics[f"loss/{norm}"], own.mean().detach())
    assert 0 <= out.metrics["robust/union"] <= min(out.metrics[f"robust/{norm}"] for norm in NORMS)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrapped_model_trains_as_the_bare_one(
    name: str, small_net: nn.Module, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    norms, objective = NORMS[: WANTED.get(name, 3)], OPTIONS[name]
    if name == "adt":
        objective = Adt(weighting="smoothness")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        unwrap, inner = copy.deepcopy(small_net), copy.deepcopy(small_net)
        results = []
        for net in (unwrap, DistributedDataParallel(inner, forward_sync_buffers=False)):
            torch.manual_seed(7)
            state = objective.initial_state(norms)
            for _ in range(2):
                out = _output(objective, net, images, _attacks(*norms), state)
                out.loss.backward()
                state = out.state
            results.append([out.loss.detach(), *(p.grad for p in net.parameters()), *state.values()])
    finally:
        # A backend drops Python objects in threads of its own: destroyed meanwhile, with the interpreter's lock held,
        # it would wait for them for ever.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_name_of_an_objective_is_that_of_its_class() -> None:
    assert [objective.name for objective in OPTIONS.values()] == list(OBJECTIVES)


def test_an_objective_is_used_in_a_notebook_as_its_interface_shows(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    names = {"model": small_net, "x": images[0], "y": images[1]}
    for example in DocTestParser().get_examples(base.__doc__):
        exec(example.source, names)
    points = names["points"]["linf"]
    assert ((points - images[0]).abs() <= 8 / 255 + 1e-6).all()
    assert not torch.equal(points, images[0])
    assert names["output"].metrics.keys() >= {"loss/linf", "robust/linf", "clean"}
    assert all(parameter.grad.isfinite().all() for parameter in small_net.parameters())


@pytest.mark.parametrize("name", OPTIONS)
def test_the_state_keeps_its_keys_and_the_old_one_its_values(
    name: str, small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    norms, objective = NORMS[: WANTED.get(name, 3)], OPTIONS[name]
    state = objective.initial_state(norms)
    kept = {key: value.clone() for key, value in state.items()}
    out = _output(objective, small_net, images, _attacks(*norms), state, draw=0.5)
    assert out.state.keys() == kept.keys() == state.keys()
    assert all(torch.equal(kept[key], state[key]) for key in kept)
    assert all(out.state[key].dtype == kept[key].dtype and out.state[key].shape == kept[key].shape for key in kept)
    assert not any(value.requires_grad for value in (*out.metrics.values(), *out.state.values()))
    assert out.loss.ndim == 0
    assert all(value.ndim == 0 for value in out.metrics.values())


@pytest.mark.parametrize("name", ["avg", "max", "adt"])
def test_a_loss_that_is_not_finite_names_the_example_and_the_step(name: str) -> None:
    losses = {"linf": [1.0, 1.0, 1.0], "l2": [1.0, 1.0, float("nan")], "l1": [1.0, 1.0, 1.0]}
    with pytest.raises(PoiseError, match="under l2 of example 2 of the batch is nan at step 41"):
        _run(OPTIONS[name], losses, OPTIONS[name].initial_state(NORMS), n=3, step=41)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", ["constant", "two classes, one example", "a thousand classes", "eps 0"])
def test_the_ends_of_the_range_are_handled(name: str, case: str) -> None:
    classes, n = (2, 1) if "two" in case else (1000 if "thousand" in case else 5, 6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, classes))
    if case == "constant":
        nn.init.zeros_(model[3].weight)
    norms, objective = NORMS[: WANTED.get(name, 3)], OPTIONS[name]
    threats = {norm: Threat(norm, 0.0 if case == "eps 0" else EPS[norm]) for norm in norms}
    attacks = {norm: _Bound(perturb, threat=threat, steps=2) for norm, threat in threats.items()}
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % classes
    out = _output(objective, model, (x, y), attacks, objective.initial_state(norms), draw=0.9)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(value.isfinite() for value in out.metrics.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    if case == "eps 0" and name not in {"mart", "gradalign"}:
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(model(x), y))


class _InPlace(nn.Module):
    """Shifts its input in place, hidden from autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.sub_(0.5)
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_images_of_the_caller_stay_as_they_are_whatever_the_model_does(name: str, natural: bool) -> None:
    norms, objective = NORMS[: WANTED.get(name, 3)], OPTIONS[name]
    if natural:  # RAMP's other epochs
        objective = Ramp() if name == "ramp" else objective
    x = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    known = x.clone()
    batch, state = (x, torch.arange(6) % 5), objective.initial_state(norms)
    _output(objective, _InPlace(), batch, _attacks(*norms), state, draw=0.9, epoch=0 if natural else 1)
    assert torch.equal(x, known)
