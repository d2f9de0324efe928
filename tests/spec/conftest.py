"""A small valid spec and a way to write it down."""

from __future__ import annotations

from pathlib import Path

import pytest

VALID = """\
kind: robust.train
name: digits
seed: 1
model: {name: cnn, width: 8}
data: {name: digits, batch_size: 64}
threats:
  linf: {eps: 8/255}
  l1: {eps: 3}
objective: {name: adt}
train:
  epochs: 2
  optimizer: {name: sgd, lr: 0.1}
"""


@pytest.fixture
def valid() -> str:
    return VALID


@pytest.fixture
def write(tmp_path: Path):
    def write_spec(text: str | bytes, name: str = "spec.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_spec
