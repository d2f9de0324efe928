"""What is refused before a job is sent."""

from __future__ import annotations

import pytest

from poise.engine import jobs
from poise.errors import UserError


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"store": "runs"}, "store: runs is a relative folder"),
        ({"store": "/shared/runs", "data": {"name": "mnist", "root": "data/mnist"}}, "data.root: data/mnist"),
    ],
)
def test_a_folder_that_does_not_last_is_refused(changes, named, spec_of):
    with pytest.raises(UserError, match=named):
        jobs.submit(spec_of(**changes), "http://127.0.0.1:9")
