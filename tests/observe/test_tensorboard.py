from __future__ import annotations

import sys
from pathlib import Path

import pytest

from poise.errors import UserError
from poise.observe.rows import Rows, read_rows
from poise.observe.tensorboard import write_tensorboard


def _table() -> object:
    rows = Rows()
    for step in (1, 2, 3):
        rows.add(step, step / 3, "train", {"loss": 1.0 / step})
    rows.add(3, 1.0, "validation", {"robust/linf": 0.25})
    return read_rows([rows.to_parquet()])


def test_scalars_are_read_back_by_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_tensorboard(_table(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "validation"]
    train = accumulator.EventAccumulator(str(tmp_path / "train")).Reload()
    assert [(event.step, event.value) for event in train.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    validation = accumulator.EventAccumulator(str(tmp_path / "validation")).Reload()
    assert [(event.step, event.value) for event in validation.Scalars("robust/linf")] == [(3, 0.25)]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install poise\[tensorboard\]"):
        write_tensorboard(_table(), tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write TensorBoard"):
        write_tensorboard(_table(), tmp_path / "file")
