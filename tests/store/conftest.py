"""Every test of the store that asks for `url` or `storage` runs on a folder and on S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise.store.storage import Storage, open_storage


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return str(request.getfixturevalue("s3_store"))


@pytest.fixture
def storage(url: str) -> Storage:
    return open_storage(url)
