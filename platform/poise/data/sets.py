"""Data sets by name: which files each one has, and what they must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poise.data import readers
from poise.data.choice import stratified_rows
from poise.data.files import image_files
from poise.data.readers import UNREADABLE, Arrays
from poise.data.spec import DataSpec
from poise.errors import UserError
from poise.store.storage import Storage, open_storage

__all__ = ["ImageSet", "Part", "read", "read_part", "unit_pixels"]

T = TypeVar("T")
Array = npt.NDArray[Any]
Part = Literal["train", "test"]

_CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100, "svhn": 10}
_MOST_CLASSES = 65_536


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

    def choose(self, n: int | None) -> ImageSet:
        """A stratified choice of `n` examples in their order, the same for every seed; all when `n` is None."""
        if n is None or n >= len(self):
            return self
        return self.select(torch.from_numpy(stratified_rows(self.labels.numpy(), n)))


def unit_pixels(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 is divided by 255, float32 is returned as it is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def read(spec: DataSpec) -> tuple[ImageSet, ImageSet, int]:
    """The training set (a stratified choice of `limit` examples), the test set and the number of classes.

    Raises:
        UserError: a file that is missing, damaged, or holds something else than its name says.
        StoreError: a folder or a bucket that cannot be read.
    """
    train, test = _arrays(spec, "train"), _arrays(spec, "test")
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{train[0].shape[1:]} in train, {test[0].shape[1:]} in test"
        raise UserError(f"{spec.root}: the images differ in shape (channels, height, width): {shapes}")
    return _image_set(*train), _image_set(*test), _num_classes(spec, train[1], test[1])


def read_part(spec: DataSpec, part: Part) -> tuple[ImageSet, int]:
    """One of the two sets of `read`, and the number of classes of both. The images of the other are not decoded.

    Raises:
        UserError, StoreError: as `read`.
    """
    arrays = _arrays(spec, part)
    other: Part = "test" if part == "train" else "train"
    others = arrays[1] if spec.name in _CLASSES else _labels(spec, open_storage(spec.root or ""), other)
    return _image_set(*arrays), _num_classes(spec, arrays[1], others)


def _num_classes(spec: DataSpec, *labels: Array) -> int:
    return _CLASSES.get(spec.name) or 1 + max(int(each.max()) for each in labels)


def _arrays(spec: DataSpec, part: Part) -> Arrays:
    """All images and labels of a part, or the choice of `limit` of the training set."""
    limit = spec.limit if part == "train" else None
    if spec.name == "digits":
        arrays = _digits()[0 if part == "train" else 1]
        return _chosen(arrays, limit)
    storage = open_storage(spec.root or "")
    names = image_files(spec, part, _names(storage), storage.url)
    if names[0].endswith(".parquet"):
        return _parquet(storage, names, spec, limit)
    return _chosen(_READERS[spec.name](storage, part, spec, names), limit)


def _chosen(arrays: Arrays, limit: int | None) -> Arrays:
    images, labels = arrays
    if limit is None or limit >= len(labels):
        return arrays
    rows = stratified_rows(labels, limit)
    return images[rows], labels[rows]


def _labels(spec: DataSpec, storage: Storage, part: Part) -> Array:
    """The labels of a part of a set of one's own, checked; none of its images is decoded."""
    names = image_files(spec, part, _names(storage), storage.url)
    if spec.name == "npz":
        labels = _decoded(storage, names[0], partial(readers.npz_labels, part=part))
    else:
        labels = np.concatenate([_decoded(storage, name, readers.parquet_labels) for name in names])
    with _naming(f"{storage.url}/{names[0]}"):
        return _checked_labels(labels, spec)


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


def _mnist(storage: Storage, part: Part, spec: DataSpec, names: Sequence[str]) -> Arrays:
    images = _decoded(storage, names[0], partial(readers.idx, dimensions=3))[:, None]
    labels = _decoded(storage, names[1], partial(readers.idx, dimensions=1))
    with _naming(f"{storage.url}/{names[0].partition('-')[0]}-images and -labels"):
        return _checked((images, labels), spec)


def _svhn(storage: Storage, part: Part, spec: DataSpec, names: Sequence[str]) -> Arrays:
    return _decoded(storage, names[0], lambda data: _checked(readers.svhn(data), spec))


def _npz(storage: Storage, part: Part, spec: DataSpec, names: Sequence[str]) -> Arrays:
    return _decoded(storage, names[0], lambda data: _checked(readers.npz(data, part), spec))


def _cifar(storage: Storage, part: Part, spec: DataSpec, names: Sequence[str]) -> Arrays:
    label_bytes = 1 if spec.name == "cifar10" else 2

    def decode(data: bytes) -> Arrays:
        return _checked(readers.cifar_binary(data, label_bytes), spec)

    return _join(storage, [_decoded(storage, name, decode) for name in names])


def _parquet(storage: Storage, names: Sequence[str], spec: DataSpec, limit: int | None) -> Arrays:
    """The rows of all shards, or a choice of them; an image that is not chosen is not decoded."""
    shards: list[Arrays] = []
    for name, rows in zip(names, _rows_of_shards(storage, names, limit), strict=True):
        if rows is None or len(rows):
            shards.append(_decoded(storage, name, partial(_shard, spec=spec, rows=rows)))
    return _join(storage, shards)


def _shard(data: bytes, spec: DataSpec, rows: Array | None) -> Arrays:
    return _checked(readers.parquet(data, rows), spec)


def _rows_of_shards(storage: Storage, names: Sequence[str], limit: int | None) -> list[Array | None]:
    """For each shard the rows that are chosen; None stands for all."""
    if limit is None:
        return [None] * len(names)
    labels = [_decoded(storage, name, readers.parquet_labels) for name in names]
    rows = stratified_rows(np.concatenate(labels), limit)
    ends = np.cumsum([len(part) for part in labels])
    return [
        rows[(rows >= end - len(part)) & (rows < end)] - (end - len(part))
        for part, end in zip(labels, ends, strict=True)
    ]


_READERS: dict[str, Callable[[Storage, Part, DataSpec, Sequence[str]], Arrays]] = {
    "mnist": _mnist,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "svhn": _svhn,
    "npz": _npz,
}


def _names(storage: Storage) -> list[str]:
    return [entry.key for entry in storage.list("")]


def _decoded(storage: Storage, name: str, decode: Callable[[bytes], T]) -> T:
    try:
        data = storage.read(name)
    except FileNotFoundError:
        raise UserError(f"{storage.url} has no {name} any more") from None
    with _naming(f"{storage.url}/{name}"):
        return decode(data)


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
    _checked_labels(labels, spec)
    if images.dtype != np.uint8 and not (images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"its pixels ({images.dtype}) are neither uint8 nor floats from 0 to 1")
    return arrays


def _checked_labels(labels: Array, spec: DataSpec) -> Array:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"its labels are {labels.dtype}, not integers")
    last = _CLASSES.get(spec.name, _MOST_CLASSES) - 1
    wrong = np.flatnonzero((labels < 0) | (labels > last))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} has label {labels[wrong[0]]}, which is not one of 0 to {last}")
    return labels


def _image_set(images: Array, labels: Array) -> ImageSet:
    dtype = np.uint8 if images.dtype == np.uint8 else np.float32
    return ImageSet(torch.from_numpy(np.array(images, dtype, order="C")), torch.from_numpy(labels.astype(np.int64)))
