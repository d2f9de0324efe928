"""The files of a folder that an image data set is read from, and the errors for missing ones. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from poise.data.images.spec import DataSpec
from poise.errors import UserError

__all__ = ["image_files"]

_BINARY = {
    "cifar10": {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]},
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}
_PICKLED = {"data_batch_1", "test_batch", "train", "test"}


def image_files(spec: DataSpec, part: str, names: Sequence[str], url: str) -> list[str]:
    """The files of one part, "train" or "test", among the `names` below `url`, in the order in which they are read.

    For mnist there are two: images, then labels.

    Raises:
        UserError: a file is missing, or several candidates exist.
    """
    if spec.name == "mnist":
        return [_mnist(part, "images", 3, names, url), _mnist(part, "labels", 1, names, url)]
    if spec.name == "svhn":
        return [_first([f"{part}_32x32.mat"], names, url)]
    if spec.name == "npz":
        return [_npz(names, url)]
    if spec.name in _BINARY:
        return _cifar(spec, part, names, url)
    return _parquet(part, names, url)


def _mnist(part: str, kind: str, dimensions: int, names: Sequence[str], url: str) -> str:
    """The idx file of images or labels: the published name, or with "." before idx, gzipped or plain."""
    stem = "train" if part == "train" else "t10k"
    candidates = [f"{stem}-{kind}{sep}idx{dimensions}-ubyte{end}" for end in (".gz", "") for sep in "-."]
    return _first(candidates, names, url)


def _npz(names: Sequence[str], url: str) -> str:
    candidates = [name for name in names if name.endswith(".npz") and "/" not in name]
    if len(candidates) > 1:
        shown = ", ".join(candidates[:5])
        raise UserError(f"{url} holds {len(candidates)} npz files ({shown}): keep only the one to read")
    return _first(candidates or ["*.npz"], names, url)


def _cifar(spec: DataSpec, part: str, names: Sequence[str], url: str) -> list[str]:
    """Binary batches where the folder has any, else Parquet."""
    binary = _BINARY[spec.name][part]
    if not set(names).isdisjoint(binary):
        return [_first([name], names, url) for name in binary]
    has_parquet = any(name.endswith(".parquet") for name in names)
    if set(names) & _PICKLED and not has_parquet:
        raise UserError(
            f"{url} holds the Python version of {spec.name}: its pickled files are never read, as a pickle "
            f"can run any code. Put the binary version there ({', '.join(binary)}), or Parquet files"
        )
    return _parquet(part, names, url, f"{', '.join(binary)} or ")


def _parquet(part: str, names: Sequence[str], url: str, others: str = "") -> list[str]:
    """All shards of a part, such as train-00000-of-00002.parquet, in any one folder below the root.

    `others` names further files that would do, for the message when there is no Parquet file.
    """
    pattern = re.compile(rf"(?:.*/)?{part}(?:[-._][^/]*)?\.parquet")
    shards = [name for name in names if pattern.fullmatch(name)]
    folders = {name.rpartition("/")[0] for name in shards}
    if len(folders) > 1:
        raise UserError(f"{url} has {part} Parquet files in {sorted(folders)}: set root to one of these folders")
    if not shards:
        raise UserError(f"{url} has no {others}{part}*.parquet")
    return shards


def _first(candidates: Sequence[str], names: Sequence[str], url: str) -> str:
    """The first of the candidates that exists."""
    file = next((name for name in candidates if name in names), None)
    if file is None:
        raise UserError(f"{url} has no {' or '.join(candidates)}")
    return file
