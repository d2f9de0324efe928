"""Data sets by name: which files each one has, and what they must hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poise.data import readers
from poise.data.readers import UNREADABLE, Arrays
from poise.data.spec import DataSpec
from poise.errors import UserError
from poise.store.storage import Storage, open_storage

__all__ = ["ImageSet", "read", "unit_pixels"]

T = TypeVar("T")
Array = npt.NDArray[Any]

_CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100, "svhn": 10}
_MOST_CLASSES = 65_536
_BINARY = {
    "cifar10": {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]},
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}
_PICKLED = {"data_batch_1", "test_batch", "train", "test"}


@dataclass(frozen=True)
class ImageSet:
    """images: (N, C, H, W), uint8 or float32 in [0, 1]; labels: (N,) int64. On the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor | slice) -> ImageSet:
        """The examples at these rows: an index tensor copies, a slice does not."""
        return ImageSet(self.images[rows], self.labels[rows])


def unit_pixels(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 is divided by 255, float32 is returned as it is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def read(spec: DataSpec) -> tuple[ImageSet, ImageSet, int]:
    """The training set (its first `limit` examples), the test set and the number of classes.

    Raises:
        UserError: a file that is missing, damaged, or holds something else than its name says.
        StoreError: a folder or a bucket that cannot be read.
    """
    if spec.name == "digits":
        train, test = _digits()
    else:
        storage = open_storage(spec.root or "")
        train, test = (_READERS[spec.name](storage, part, spec) for part in ("train", "test"))
        if train[0].shape[1:] != test[0].shape[1:]:
            shapes = f"{train[0].shape[1:]} in train, {test[0].shape[1:]} in test"
            raise UserError(f"{storage.url}: the images differ in shape (channels, height, width): {shapes}")
    classes = _CLASSES.get(spec.name) or 1 + int(max(train[1].max(), test[1].max()))
    return _image_set(train[0][: spec.limit], train[1][: spec.limit]), _image_set(*test), classes


def _digits() -> tuple[Arrays, Arrays]:
    """scikit-learn's 1,797 digits, split once and for all into 1,437 and 360 with equal shares of each class."""
    table = np.loadtxt(_digits_file(), delimiter=",")
    images = (table[:, :-1] / 16).astype(np.float32).reshape(-1, 1, 8, 8)  # whole sixteenths: exact
    labels = table[:, -1].astype(np.int64)
    by_class = np.lexsort((np.random.default_rng(0).permutation(len(labels)), labels))
    test = np.zeros(len(labels), dtype=bool)
    test[by_class[::5]] = True
    return (images[~test], labels[~test]), (images[test], labels[test])


def _digits_file() -> Path:
    """The file that `sklearn.datasets.load_digits` reads; importing scikit-learn for it would cost over a second."""
    package = find_spec("sklearn")
    if package is None or package.submodule_search_locations is None:
        raise UserError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    return Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")


def _mnist(storage: Storage, part: str, spec: DataSpec) -> Arrays:
    stem = "train" if part == "train" else "t10k"

    def file(kind: str, dimensions: int) -> Array:
        names = [f"{stem}-{kind}{sep}idx{dimensions}-ubyte{end}" for end in (".gz", "") for sep in "-."]
        return _first(storage, names, partial(readers.idx, dimensions=dimensions))

    arrays = file("images", 3)[:, None], file("labels", 1)
    with _naming(f"{storage.url}/{stem}-images and -labels"):
        return _checked(arrays, spec)


def _svhn(storage: Storage, part: str, spec: DataSpec) -> Arrays:
    return _first(storage, [f"{part}_32x32.mat"], lambda data: _checked(readers.svhn(data), spec))


def _npz(storage: Storage, part: str, spec: DataSpec) -> Arrays:
    names = [name for name in _names(storage) if name.endswith(".npz") and "/" not in name]
    if len(names) > 1:
        raise UserError(f"{storage.url} holds {len(names)} npz files ({', '.join(names[:5])}): keep the one to read")
    return _first(storage, names or ["*.npz"], lambda data: _checked(readers.npz(data, part), spec))


def _cifar(storage: Storage, part: str, spec: DataSpec) -> Arrays:
    """Binary batches where the folder has any, else Parquet."""
    present, wanted = set(_names(storage)), _BINARY[spec.name][part]
    if not present.isdisjoint(wanted):
        label_bytes = 1 if spec.name == "cifar10" else 2

        def decode(data: bytes) -> Arrays:
            return _checked(readers.cifar_binary(data, label_bytes), spec)

        return _join(storage, [_first(storage, [name], decode) for name in wanted])
    if present & _PICKLED and not any(name.endswith(".parquet") for name in present):
        raise UserError(
            f"{storage.url} holds the Python version of {spec.name}: its pickled files are never read, as a pickle "
            f"can run any code. Put the binary version there ({', '.join(wanted)}), or Parquet files"
        )
    return _parquet(storage, part, spec, f"{', '.join(wanted)} or ")


def _parquet(storage: Storage, part: str, spec: DataSpec, others: str = "") -> Arrays:
    """All shards of a part, such as train-00000-of-00002.parquet, wherever below the root they lie together."""
    pattern = re.compile(rf"(?:.*/)?{part}(?:[-._][^/]*)?\.parquet")
    names = [name for name in _names(storage) if pattern.fullmatch(name)]
    folders = {name.rpartition("/")[0] for name in names}
    if len(folders) > 1:
        raise UserError(
            f"{storage.url} has {part} Parquet files in {sorted(folders)}: set root to one of these folders"
        )
    if not names:
        raise UserError(f"{storage.url} has no {others}{part}*.parquet")
    return _join(storage, _shards(storage, names, spec, spec.limit if part == "train" else None))


def _shards(storage: Storage, names: Sequence[str], spec: DataSpec, rows: int | None) -> list[Arrays]:
    def decode(data: bytes) -> Arrays:
        return _checked(readers.parquet(data, rows), spec)

    shards: list[Arrays] = []
    for name in names:
        shards.append(_first(storage, [name], decode))
        rows = None if rows is None else rows - len(shards[-1][1])
        if rows == 0:
            break
    return shards


_READERS: dict[str, Callable[[Storage, str, DataSpec], Arrays]] = {
    "mnist": _mnist,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "svhn": _svhn,
    "npz": _npz,
    "images": _parquet,
}


def _names(storage: Storage) -> list[str]:
    return [entry.key for entry in storage.list("")]


def _first(storage: Storage, names: Sequence[str], decode: Callable[[bytes], T]) -> T:
    """Decode the first of these files that exists."""
    for name in names:
        try:
            data = storage.read(name)
        except FileNotFoundError:
            continue
        with _naming(f"{storage.url}/{name}"):
            return decode(data)
    raise UserError(f"{storage.url} has no {' or '.join(names)}")


@contextmanager
def _naming(file: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read: {error or type(error).__name__}") from error


def _join(storage: Storage, parts: Sequence[Arrays]) -> Arrays:
    images, labels = zip(*parts, strict=True)
    with _naming(storage.url):
        return np.concatenate(images), np.concatenate(labels)


def _checked(arrays: Arrays, spec: DataSpec) -> Arrays:
    """The arrays themselves, if they are images with pixels in range, each with a label in range."""
    images, labels = arrays
    if labels.shape != (len(images),) or not len(images):
        raise ValueError(f"it has {len(images)} images, and labels of shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"its labels are {labels.dtype}, not integers")
    if images.dtype != np.uint8 and not (images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"its pixels ({images.dtype}) are neither uint8 nor floats from 0 to 1")
    last = _CLASSES.get(spec.name, _MOST_CLASSES) - 1
    wrong = np.flatnonzero((labels < 0) | (labels > last))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} has label {labels[wrong[0]]}, which is not one of 0 to {last}")
    return arrays


def _image_set(images: Array, labels: Array) -> ImageSet:
    dtype = np.uint8 if images.dtype == np.uint8 else np.float32
    return ImageSet(torch.from_numpy(np.array(images, dtype, order="C")), torch.from_numpy(labels.astype(np.int64)))
