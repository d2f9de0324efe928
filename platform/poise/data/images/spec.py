"""The spec of images that a run reads, and their sizes where these are known without reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from poise.data.validation import num_validation
from poise.spec import CodeReference, Input, SpecModel, field_error

__all__ = ["DataSpec", "Sizes", "known_sizes"]

_PARQUET = r"(.*/)?(train|test)([-._][^/]*)?\.parquet"
_IMAGE_FILES = {
    "mnist": r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?",
    "cifar10": rf"(data_batch_[1-5]|test_batch)\.bin|{_PARQUET}",
    "cifar100": rf"(train|test)\.bin|{_PARQUET}",
    "svhn": r"(train|test)_32x32\.mat",
    "npz": r"[^/]*\.npz",
    "images": _PARQUET,
    "function": ".*",
}
"""Regular expressions of the file names below `root` that a data set is read from."""


class DataSpec(SpecModel):
    """The `data` section."""

    name: Literal["digits", "mnist", "cifar10", "cifar100", "svhn", "npz", "images", "function"] = Field(
        default="digits",
        description="data set; digits comes with scikit-learn, images is Parquet with encoded images, function is code "
        "of yours",
    )
    root: str | None = Field(
        default=None,
        min_length=1,
        description="folder or s3://bucket/prefix with the files; required for every data set but digits and function",
    )
    function: CodeReference | None = Field(
        default=None,
        description="package.module:function in your code, called with `train` or `test`, that returns images "
        "(N, C, H, W) in [0, 1] or uint8, and labels (N,)",
    )
    arguments: dict[str, Any] = Field(
        default={}, description="keyword arguments that the function is called with; also root, where it is set"
    )
    batch_size: int = Field(
        default=128, ge=1, le=65536, description="training examples per step, over all workers together"
    )
    pad: int = Field(default=0, ge=0, le=64, description="pixels of padding on each side before a random crop")
    pad_mode: Literal["reflect", "zero"] = Field(default="reflect", description="content of the padding")
    flip: bool = Field(default=False, description="mirror half of the training images, left to right")
    validation: int | None = Field(
        default=None,
        ge=0,
        description="training examples held out by a seeded permutation (default: a tenth, at most 1000)",
    )
    limit: int | None = Field(
        default=None,
        ge=2,
        description="number of training examples to use, the same share of each class, validation examples included",
    )
    device_resident: bool = Field(
        default=True, description="keep the training images in device memory; false copies each batch from the host"
    )

    @model_validator(mode="after")
    def _root_fits_name(self) -> DataSpec:
        if self.name == "digits" and self.root is not None:
            raise ValueError("digits comes with scikit-learn: remove root, or name another data set")
        if (self.name == "function") != (self.function is not None):
            raise field_error("function", "name: function and function: PACKAGE.MODULE:FUNCTION belong together")
        if self.arguments and self.function is None:
            raise field_error("arguments", "only a function takes arguments: remove them")
        if self.name not in ("digits", "function") and self.root is None:
            raise ValueError(f"{self.name} is read from files: set root to their folder or to s3://bucket/prefix")
        return self

    def inputs(self) -> Iterator[Input]:
        """The files of the data set and the code. The digits have none: the version of scikit-learn identifies them."""
        if self.root is not None:
            yield Input(("root",), "files", self.root, _IMAGE_FILES[self.name])
        if self.function is not None:
            yield Input(("function",), "code", self.function)


class Sizes(NamedTuple):
    """The number of examples in each split, the shape (C, H, W) of an image, and the number of classes."""

    train: int
    validation: int
    test: int
    shape: tuple[int, int, int]
    classes: int


_PUBLISHED = {
    "digits": (1437, 360, (1, 8, 8), 10),
    "mnist": (60_000, 10_000, (1, 28, 28), 10),
    "cifar10": (50_000, 10_000, (3, 32, 32), 10),
    "cifar100": (50_000, 10_000, (3, 32, 32), 100),
    "svhn": (73_257, 26_032, (3, 32, 32), 10),
}


def known_sizes(spec: DataSpec) -> Sizes | None:
    """The sizes of a published data set after `limit` and `validation`; None for a data set of the user."""
    if spec.name not in _PUBLISHED:
        return None
    stored, test, shape, classes = _PUBLISHED[spec.name]
    total = min(stored, spec.limit or stored)
    validation = num_validation(spec.validation, total)
    return Sizes(max(total - validation, 0), validation, test, shape, classes)
