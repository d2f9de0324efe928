"""What is refused before a job is sent."""

from __future__ import annotations

import pytest

from poise.engine import jobs
from poise.errors import UserError
from poise.kinds.specs import RobustTrainSpec

BASE = {
    "kind": "robust.train",
    "name": "one",
    "model": {},
    "data": {},
    "threats": {"linf": {"eps": 0.1}},
    "objective": {"name": "at"},
    "train": {"epochs": 1},
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"store": "runs"}, "store: runs is a relative folder"),
        ({"store": "/shared/runs", "data": {"name": "mnist", "root": "data/mnist"}}, "data.root: data/mnist"),
    ],
)
def test_a_folder_that_does_not_last_is_refused(changes, named):
    with pytest.raises(UserError, match=named):
        jobs.submit(RobustTrainSpec.model_validate({**BASE, **changes}), "http://127.0.0.1:9")
