"""A small valid spec, with changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from poise.kinds.robust_train.spec import RobustTrainSpec

_VALUES = {
    "kind": "robust.train",
    "name": "one",
    "model": {},
    "data": {},
    "threats": {"linf": {"eps": 0.1}},
    "objective": {"name": "at"},
    "train": {"epochs": 1},
}


@pytest.fixture
def spec_of() -> Callable[..., RobustTrainSpec]:
    def make(**changes: object) -> RobustTrainSpec:
        return RobustTrainSpec.model_validate({**_VALUES, **changes})

    return make
