"""What only changes speed and rounding: threats side by side in one batch, and a compiled network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.kinds.robust_train.step import RobustStep
from poise.models.build import build
from poise.observe.timers import PhaseTimers
from poise.train.task import StepContext

THREATS = {
    norm: {"eps": eps, "steps": 4, "random_start": False} for norm, eps in {"linf": 0.1, "l2": 0.5, "l1": 2}.items()
}


def spec_of(**changes: Any) -> RobustTrainSpec:
    tree = {
        "kind": "robust.train",
        "name": "c",
        "model": {"name": "cnn", "width": 4},
        "data": {"name": "digits", "batch_size": 16},
        "threats": THREATS,
        "objective": {"name": "adt"},
        "train": {"steps": 1},
        **changes,
    }
    return RobustTrainSpec.model_validate(tree)


def stepped(spec: RobustTrainSpec) -> tuple[list[torch.Tensor], int]:
    """Loss, metrics and gradients of the first step, and how many batches the network has seen."""
    seen = []
    model = build(spec.model, shape=(1, 8, 8), classes=10, mean=[0.3], std=[0.4], seed=0)
    model.register_forward_hook(lambda *_: seen.append(1))
    draw = torch.Generator().manual_seed(0)
    batch = torch.rand(16, 1, 8, 8, generator=draw), torch.randint(10, (16,), generator=draw)
    step = RobustStep(spec, model, 1)
    step_context = StepContext(0, 0, True, draw, PhaseTimers(), lambda values: values)
    out = step.step(model, batch, step.initial(), step_context)
    out.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [out.loss.detach(), *(out.metrics[name] for name in sorted(out.metrics)), *gradients], len(seen)


@pytest.mark.parametrize("objective", ["adt", "avg", "max", "mix"])
def test_threats_in_one_batch_are_those_of_one_after_the_other(objective):
    both = [stepped(spec_of(objective={"name": objective}, compute={"fused": fused})) for fused in (True, False)]
    (fused, few), (separate, many) = both
    assert (few, many) == ((4 + 1, 12 + 1) if objective == "mix" else (4 + 3, 12 + 3))
    for one, other in zip(fused, separate, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_perturbed_weights_see_the_same_points_in_one_batch():
    fused, separate = (stepped(spec_of(awp={"gamma": 0.05}, compute={"fused": fused}))[0] for fused in (True, False))
    for one, other in zip(fused, separate, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [{"steps": 3}, {"step_size": 0.1}, {"random_start": True}, {"attack": "apgd"}])
def test_attacks_that_take_other_steps_stay_apart(change):
    l2 = {**THREATS["l2"], **change}
    _, passes = stepped(spec_of(threats={**THREATS, "l2": l2}))
    assert passes > 4 + 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_network_is_attacked_as_the_eager_one():
    compiled, eager = (stepped(spec_of(compute={"compile": compile}))[0] for compile in (True, False))
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
