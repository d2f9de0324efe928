"""Which files of a folder an image data set is read from, and what is said when they are not there. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from poise.data.spec import DataSpec
from poise.errors import UserError

__all__ = ["image_files"]

_BINARY = {
    "cifar10": {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]},
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}
_PICKLED = {"data_batch_1", "test_batch", "train", "test"}


def image_files(spec: DataSpec, part: str, names: Sequence[str], url: str) -> list[str]:
    """The files of one part, "train" or "test", among the `names` below `url`, in the order in which they are read.

    For mnist these are two: images, then labels.

    Raises:
        UserError: what is missing, or more than one thing that could be meant.
    """
    if spec.name == "mnist":
        return [_mnist(part, kind, dimensions, names, url) for kind, dimensions in (("images", 3), ("labels", 1))]
    if spec.name == "svhn":
        return [_first([f"{part}_32x32.mat"], names, url)]
    if spec.name == "npz":
        return [_npz(names, url)]
    if spec.name in _BINARY:
        return _cifar(spec, part, names, url)
    return _parquet(part, names, url)


def _mnist(part: str, kind: str, dimensions: int, names: Sequence[str], url: str) -> str:
    stem = "train" if part == "train" else "t10k"
    return _first([f"{stem}-{kind}{sep}idx{dimensions}-ubyte{end}" for end in (".gz", "") for sep in "-."], names, url)


def _npz(names: Sequence[str], url: str) -> str:
    found = [name for name in names if name.endswith(".npz") and "/" not in name]
    if len(found) > 1:
        raise UserError(f"{url} holds {len(found)} npz files ({', '.join(found[:5])}): keep the one to read")
    return _first(found or ["*.npz"], names, url)


def _cifar(spec: DataSpec, part: str, names: Sequence[str], url: str) -> list[str]:
    """Binary batches where the folder has any, else Parquet."""
    wanted = _BINARY[spec.name][part]
    if not set(names).isdisjoint(wanted):
        return [_first([name], names, url) for name in wanted]
    if set(names) & _PICKLED and not any(name.endswith(".parquet") for name in names):
        raise UserError(
            f"{url} holds the Python version of {spec.name}: its pickled files are never read, as a pickle "
            f"can run any code. Put the binary version there ({', '.join(wanted)}), or Parquet files"
        )
    return _parquet(part, names, url, f"{', '.join(wanted)} or ")


def _parquet(part: str, names: Sequence[str], url: str, others: str = "") -> list[str]:
    """All shards of a part, such as train-00000-of-00002.parquet, wherever below the root they lie together."""
    pattern = re.compile(rf"(?:.*/)?{part}(?:[-._][^/]*)?\.parquet")
    found = [name for name in names if pattern.fullmatch(name)]
    folders = {name.rpartition("/")[0] for name in found}
    if len(folders) > 1:
        raise UserError(f"{url} has {part} Parquet files in {sorted(folders)}: set root to one of these folders")
    if not found:
        raise UserError(f"{url} has no {others}{part}*.parquet")
    return found


def _first(wanted: Sequence[str], names: Sequence[str], url: str) -> str:
    """The first of these files that exists."""
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise UserError(f"{url} has no {' or '.join(wanted)}")
    return found
