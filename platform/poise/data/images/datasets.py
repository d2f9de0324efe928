"""Image data sets by name: their files, and the checks of what the files hold."""

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

from poise.data.images import readers
from poise.data.images.choice import stratified_rows
from poise.data.images.files import image_files
from poise.data.images.readers import UNREADABLE, Arrays
from poise.data.images.spec import DataSpec
from poise.errors import UserError
from poise.store.storage import Storage, open_storage
from poise.user_code import current_folder_first, explain_errors, load_attribute

__all__ = ["ImageSet", "Part", "read", "read_part", "to_float"]

T = TypeVar("T")
Array = npt.NDArray[Any]
Part = Literal["train", "test"]

_CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100, "svhn": 10}
_MOST_CLASSES = 65_536


@dataclass(frozen=True)
class ImageSet:
    """images: (N, C, H, W), uint8 or float32 in [0, 1]. labels: (N,) int64. Both on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor | slice) -> ImageSet:
        """The examples at these rows: an index tensor copies, a slice does not."""
        return ImageSet(self.images[rows], self.labels[rows])

    def choose(self, n: int | None) -> ImageSet:
        """A stratified subset of `n` examples in their order, the same for every seed; all when `n` is None."""
        if n is None or n >= len(self):
            return self
        return self.select(torch.from_numpy(stratified_rows(self.labels.numpy(), n)))


def to_float(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 is divided by 255, float32 is returned as it is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def read(spec: DataSpec) -> tuple[ImageSet, ImageSet, int]:
    """The training set (a stratified subset when `limit` is set), the test set and the number of classes.

    Raises:
        UserError: a file is missing or damaged, or its content does not fit its name.
        StoreError: a folder or a bucket cannot be read.
    """
    train_images, train_labels = _arrays(spec, "train")
    test_images, test_labels = _arrays(spec, "test")
    if train_images.shape[1:] != test_images.shape[1:]:
        shapes = f"{train_images.shape[1:]} in train, {test_images.shape[1:]} in test"
        raise UserError(f"{spec.root or spec.function}: the images differ in shape (channels, height, width): {shapes}")
    classes = _num_classes(spec, train_labels, test_labels)
    return _image_set(train_images, train_labels), _image_set(test_images, test_labels), classes


def read_part(spec: DataSpec, part: Part) -> tuple[ImageSet, int]:
    """The training or the test set of `read`, and the number of classes of both. Images of the other are not decoded.

    Raises:
        UserError, StoreError: as `read`.
    """
    images, labels = _arrays(spec, part)
    other_labels = labels
    if spec.name not in _CLASSES:  # the other part may have further classes
        other: Part = "test" if part == "train" else "train"
        other_labels = _labels(spec, other)
    return _image_set(images, labels), _num_classes(spec, labels, other_labels)


def _num_classes(spec: DataSpec, *labels: Array) -> int:
    """The published number of classes; for a data set of the user, one more than the largest label."""
    return _CLASSES.get(spec.name) or 1 + max(int(array.max()) for array in labels)


def _arrays(spec: DataSpec, part: Part) -> Arrays:
    """All images and labels of a part; of the training set a stratified subset when `limit` is set."""
    limit = spec.limit if part == "train" else None
    if spec.name == "digits":
        train, test = _digits()
        return _limit_rows(train if part == "train" else test, limit)
    if spec.name == "function":
        return _limit_rows(_call_function(spec, part), limit)
    storage = open_storage(spec.root or "")
    names = image_files(spec, part, _names(storage), storage.url)
    if names[0].endswith(".parquet"):
        return _parquet(storage, names, spec, limit)
    read_arrays = _READERS[spec.name]
    return _limit_rows(read_arrays(storage, part, spec, names), limit)


def _limit_rows(arrays: Arrays, limit: int | None) -> Arrays:
    """A stratified subset of `limit` examples; all of them when `limit` is None."""
    images, labels = arrays
    if limit is None or limit >= len(labels):
        return arrays
    rows = stratified_rows(labels, limit)
    return images[rows], labels[rows]


def _labels(spec: DataSpec, part: Part) -> Array:
    """The checked labels of a part of a data set of the user; no image of an npz or Parquet data set is decoded."""
    if spec.name == "function":
        return _call_function(spec, part)[1]
    storage = open_storage(spec.root or "")
    names = image_files(spec, part, _names(storage), storage.url)
    if spec.name == "npz":
        labels = _decode_file(storage, names[0], partial(readers.npz_labels, part=part))
    else:
        labels = np.concatenate([_decode_file(storage, name, readers.parquet_labels) for name in names])
    with _report_unreadable(f"{storage.url}/{names[0]}"):
        _check_labels(labels, spec)
    return labels


def _digits() -> tuple[Arrays, Arrays]:
    """scikit-learn's 1,797 digits in a fixed split of 1,437 training and 360 test images, stratified by class."""
    table = np.loadtxt(_digits_file(), delimiter=",")  # (1797, 65): 64 pixels from 0 to 16, then the label
    images = (table[:, :-1] / 16).astype(np.float32).reshape(-1, 1, 8, 8)  # sixteenths are exact in float32
    labels = table[:, -1].astype(np.int64)
    # every fifth example of the classes in turn, shuffled within each class
    by_class = np.lexsort((np.random.default_rng(0).permutation(len(labels)), labels))
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[::5]] = True
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


def _digits_file() -> Path:
    """The file that `sklearn.datasets.load_digits` reads. Importing scikit-learn would take over a second."""
    package = find_spec("sklearn")
    if package is None or package.submodule_search_locations is None:
        raise UserError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    return Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")


def _call_function(spec: DataSpec, part: Part) -> Arrays:
    """The images and labels that the user's function returns for a part.

    Raises:
        UserError: code is not allowed, the function fails, or it returns something else.
    """
    reference = str(spec.function)
    what = f"data.function: {reference}"
    function = load_attribute(reference, "data.function")
    arguments = spec.arguments if spec.root is None else {"root": spec.root, **spec.arguments}
    with explain_errors(what), current_folder_first():
        images, labels = function(part, **arguments)
        arrays = np.asarray(images), np.asarray(labels)
    if arrays[0].ndim != 4:
        raise UserError(f"{what} returned images of shape {arrays[0].shape}, not (N, channels, height, width)")
    try:
        return _validate(arrays, spec)
    except ValueError as error:
        raise UserError(f"{what} returned for {part} what cannot be used: {error}") from None


def _mnist(storage: Storage, part: Part, spec: DataSpec, names: Sequence[str]) -> Arrays:
    images = _decode_file(storage, names[0], partial(readers.idx, dimensions=3))[:, None]
    labels = _decode_file(storage, names[1], partial(readers.idx, dimensions=1))
    with _report_unreadable(f"{storage.url}/{names[0].partition('-')[0]}-images and -labels"):
        return _validate((images, labels), spec)


def _svhn(storage: Storage, part: Part, spec: DataSpec, names: Sequence[str]) -> Arrays:
    def decode(data: bytes) -> Arrays:
        return _validate(readers.svhn(data), spec)

    return _decode_file(storage, names[0], decode)


def _npz(storage: Storage, part: Part, spec: DataSpec, names: Sequence[str]) -> Arrays:
    def decode(data: bytes) -> Arrays:
        return _validate(readers.npz(data, part), spec)

    return _decode_file(storage, names[0], decode)


def _cifar(storage: Storage, part: Part, spec: DataSpec, names: Sequence[str]) -> Arrays:
    label_bytes = 1 if spec.name == "cifar10" else 2

    def decode(data: bytes) -> Arrays:
        return _validate(readers.cifar_binary(data, label_bytes), spec)

    return _concatenate(storage, [_decode_file(storage, name, decode) for name in names])


def _parquet(storage: Storage, names: Sequence[str], spec: DataSpec, limit: int | None) -> Arrays:
    """The rows of all shards, or a stratified subset; only images of the subset are decoded."""

    def decode(data: bytes, rows: Array | None) -> Arrays:
        return _validate(readers.parquet(data, rows), spec)

    shards: list[Arrays] = []
    for name, rows in zip(names, _rows_of_shards(storage, names, limit), strict=True):
        if rows is None or len(rows):
            shards.append(_decode_file(storage, name, partial(decode, rows=rows)))
    return _concatenate(storage, shards)


def _rows_of_shards(storage: Storage, names: Sequence[str], limit: int | None) -> list[Array | None]:
    """The rows to read of each shard, counted from its first row; None for all rows."""
    if limit is None:
        return [None] * len(names)
    labels = [_decode_file(storage, name, readers.parquet_labels) for name in names]
    rows = stratified_rows(np.concatenate(labels), limit)  # counted over all shards
    rows_of_shards: list[Array | None] = []
    start = 0
    for shard_labels in labels:
        end = start + len(shard_labels)
        rows_of_shards.append(rows[(rows >= start) & (rows < end)] - start)
        start = end
    return rows_of_shards


_READERS: dict[str, Callable[[Storage, Part, DataSpec, Sequence[str]], Arrays]] = {
    "mnist": _mnist,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "svhn": _svhn,
    "npz": _npz,
}


def _names(storage: Storage) -> list[str]:
    return [entry.key for entry in storage.list("")]


def _decode_file(storage: Storage, name: str, decode: Callable[[bytes], T]) -> T:
    """The content of a file, parsed by `decode`; UserError that names the file where it is gone or malformed."""
    try:
        data = storage.read(name)
    except FileNotFoundError:
        raise UserError(f"{storage.url} has no {name} any more") from None
    with _report_unreadable(f"{storage.url}/{name}"):
        return decode(data)


@contextmanager
def _report_unreadable(file: str) -> Iterator[None]:
    """Turn the errors of readers into a UserError that names the file."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read: {error or type(error).__name__}") from error


def _concatenate(storage: Storage, parts: Sequence[Arrays]) -> Arrays:
    images, labels = zip(*parts, strict=True)
    with _report_unreadable(storage.url):  # parts whose images differ in shape
        return np.concatenate(images), np.concatenate(labels)


def _validate(arrays: Arrays, spec: DataSpec) -> Arrays:
    """The arrays unchanged; ValueError unless pixels and labels are in range and there is one label per image."""
    images, labels = arrays
    if labels.shape != (len(images),) or not len(images):
        raise ValueError(f"it has {len(images)} images, and labels of shape {labels.shape}")
    _check_labels(labels, spec)
    if images.dtype != np.uint8 and not (images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"its pixels ({images.dtype}) are neither uint8 nor floats from 0 to 1")
    return arrays


def _check_labels(labels: Array, spec: DataSpec) -> None:
    """ValueError for labels that are no integers or out of range."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"its labels are {labels.dtype}, not integers")
    last = _CLASSES.get(spec.name, _MOST_CLASSES) - 1
    wrong = np.flatnonzero((labels < 0) | (labels > last))
    if len(wrong):
        row = wrong[0]
        raise ValueError(f"row {row} has label {labels[row]}, which is not one of 0 to {last}")


def _image_set(images: Array, labels: Array) -> ImageSet:
    dtype = np.uint8 if images.dtype == np.uint8 else np.float32
    pixels = torch.from_numpy(np.array(images, dtype, order="C"))
    return ImageSet(pixels, torch.from_numpy(labels.astype(np.int64)))
