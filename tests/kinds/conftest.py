"""What the tests of several kinds check."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest

from poise.observe.rows import read_rows
from poise.spec import RunSpec
from poise.store.runs import Run


def _numbers(tree: Any, path: str = "") -> list[str]:
    """The dotted paths of all numbers in a summary."""
    if isinstance(tree, dict):
        return [found for key, value in tree.items() for found in _numbers(value, f"{path}.{key}" if path else key)]
    return [path] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []


@pytest.fixture(scope="session")
def assert_measured() -> Callable[[RunSpec, Run], None]:
    """What a spec says that its run measures, by which a sweep may judge, is there when the run has ended."""

    def check(spec: RunSpec, run: Run) -> None:
        rows = read_rows(run.read(name) for name in run.files("metrics/") if name.endswith(".parquet")).to_pylist()
        found = {(row["split"], row["name"]) for row in rows}
        numbers = _numbers(json.loads(run.read("result.json")))
        declared = spec.metrics()
        assert declared
        for name, source in declared.items():
            if source.rows is not None:
                assert (source.rows, name) in found, f"{name} is in no row of {source.rows}"
            else:
                there = any(fnmatchcase(path, name) for path in numbers)
                assert there == (not source.needs), f"{name}: in the summary {there}, needs {source.needs!r}"
        during = {name for name, source in declared.items() if source.during}
        assert during == ({name for split, name in found if split == "validation"} if during else set())

    return check
