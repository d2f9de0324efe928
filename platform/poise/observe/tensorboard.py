"""Writes metric rows as TensorBoard event files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from poise.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["write_tensorboard"]


def write_tensorboard(rows: pa.Table, folder: Path) -> None:
    """Write `rows` (a table of `read_rows`) as scalars under `folder`, one TensorBoard run per split.

    UserError if the tensorboard package is not installed or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "TensorBoard files need the tensorboard package: pip install poise[tensorboard], or leave them out"
        ) from error
    writers: dict[str, SummaryWriter] = {}
    try:
        for row in rows.to_pylist():
            split = row["split"]
            if split not in writers:
                writers[split] = SummaryWriter(str(Path(folder) / split))
            writers[split].add_scalar(row["name"], row["value"], row["step"])
    except OSError as error:
        raise UserError(f"cannot write TensorBoard files under {folder}: {error}") from error
    finally:
        for writer in writers.values():
            writer.close()
