"""Learning-rate factors against closed forms and against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from poise.spec import ExactNumber
from poise.train.schedule import factor
from poise.train.spec import Constant, Cosine, Linear, OneCycle, Piecewise

TOTAL = 40


def curve(schedule) -> list[float]:
    return [factor(schedule, step, TOTAL) for step in range(TOTAL)]


def torchs(make) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_constant_and_warm_up():
    assert curve(Constant()) == [1.0] * TOTAL
    assert curve(Constant(warmup_steps=4))[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_piecewise_is_torchs_multistep():
    schedule = Piecewise(milestones=[ExactNumber("1/2"), ExactNumber("3/4")], factor=ExactNumber("0.1"))
    assert curve(schedule) == pytest.approx(
        torchs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [TOTAL // 2, 3 * TOTAL // 4], 0.1))
    )


def test_cosine_is_torchs_annealing():
    schedule = Cosine(final=ExactNumber("0.1"))
    assert curve(schedule) == pytest.approx(
        torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1))
    )


def test_linear_follows_its_points():
    """The schedule of the multi-norm protocol: 0 to 1 in 40 %, to 0.05 at 80 %, to 0 at the end."""
    points = [
        [ExactNumber(0), ExactNumber(0)],
        [ExactNumber("0.4"), ExactNumber(1)],
        [ExactNumber("0.8"), ExactNumber("0.05")],
        [ExactNumber(1), ExactNumber(0)],
    ]
    values = curve(Linear(points=points))
    assert [values[0], values[8], values[16], values[24], values[32], values[36]] == pytest.approx(
        [0, 0.5, 1, 0.525, 0.05, 0.025]
    )
    assert values[-1] > 0  # the last step still trains


def test_one_cycle_goes_up_to_one_and_down():
    values = curve(OneCycle(peak=ExactNumber("0.25"), start=ExactNumber("0.04"), final=ExactNumber(0)))
    assert values[0] == pytest.approx(0.04)
    assert values[10] == pytest.approx(1)
    assert max(values) == values[10]
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
