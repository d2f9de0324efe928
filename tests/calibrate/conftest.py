"""A synthetic table of answers with figures that any implementation must give, kept beside the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def fixture() -> dict[str, Any]:
    path = Path(__file__).resolve().parents[3] / "shared" / "papers" / "calibration_fixture.json"
    if not path.is_file():
        pytest.skip("no calibration_fixture.json beside the repository, in shared/papers")
    return json.loads(path.read_text())
