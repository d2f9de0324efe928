"""Files of every format, written by the tests themselves, and the folder of real data where there is one."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def shared_images() -> Path:
    """Real image files, read-only; a clone of the project alone has none."""
    default = Path(__file__).parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("POISE_SHARED_DATA", default)) / "images"
    if not folder.is_dir():
        pytest.skip("no shared data: set POISE_SHARED_DATA to its folder")
    return folder


@pytest.fixture
def bucket(monkeypatch) -> Iterator[Any]:
    """A bucket called `images` on a loopback S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = boto3.resource("s3").Bucket("images")
    bucket.create()
    yield bucket
    server.stop()


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """An array (H, W) or (H, W, C) as the bytes of a PNG file."""

    def encode(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return encode


@pytest.fixture
def write_parquet(encode) -> Callable[..., None]:
    """Write images (N, H, W) or (N, H, W, C) and labels; `struct` as the Hugging Face hub stores them."""

    def write(path: Path, images, labels, *, image="image", label="label", struct=False, rows_per_group=3) -> None:
        column = [encode(pixels) for pixels in images]
        if struct:
            column = [{"bytes": data, "path": None} for data in column]
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({image: column, label: labels}), path, row_group_size=rows_per_group)

    return write
