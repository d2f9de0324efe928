"""Names, types, shapes and places of the tensors of safetensors files, read from their headers without the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from poise.errors import UserError

__all__ = ["LFS_POINTER", "StoredTensor", "begin_alike", "read_header"]

LFS_POINTER = b"version https://git-lfs"
"""The first bytes of a file whose content Git LFS has not fetched."""

_LARGEST_HEADER = 100 * 2**20
_COMPARED = 2**20


class StoredTensor(NamedTuple):
    """A tensor of a file: its type as safetensors writes it (such as BF16), its shape, its first byte and its end."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Raises:
        UserError: the file cannot be read, is no safetensors file, or has another length than its header states.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stored:
            first_bytes = stored.read(len(LFS_POINTER))
            length = int.from_bytes(first_bytes[:8], "little")  # of the JSON header, which follows
            stored.seek(8)
            header = stored.read(min(length, _LARGEST_HEADER))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if first_bytes == LFS_POINTER:
        raise UserError(f"{file} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    if size < 8 or len(header) < length:
        raise UserError(f"{file} is no safetensors file, or is cut off")
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        tensors = {name: _tensor(file, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{file} is no safetensors file: its header cannot be read") from error
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise UserError(f"{file} holds {size:,} bytes where its header promises {end:,}: it is cut off")
    return tensors


def begin_alike(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and first megabyte, which is enough to tell that one is a copy."""
    same_form = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_form and _beginning(one) == _beginning(other)


def _tensor(file: Path, entry: dict[str, list[int]], offset: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(file, str(entry["dtype"]), tuple(map(int, entry["shape"])), offset + start, offset + end)


def _beginning(tensor: StoredTensor) -> bytes:
    with tensor.file.open("rb") as stored:
        stored.seek(tensor.start)
        return stored.read(min(_COMPARED, tensor.end - tensor.start))
