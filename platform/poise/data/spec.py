"""Which images a run trains on, and how many there are, without reading them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from poise.spec import Section

__all__ = ["DataSpec", "Sizes", "known_sizes", "num_validation"]


class DataSpec(Section):
    """The `data` section."""

    name: Literal["digits", "mnist", "cifar10", "cifar100", "svhn", "npz", "images"] = Field(
        default="digits", description="data set; digits comes with scikit-learn, images is Parquet with encoded images"
    )
    root: str | None = Field(
        default=None,
        min_length=1,
        description="folder or s3://bucket/prefix with the files; every set but digits has one",
    )
    batch_size: int = Field(
        default=128, ge=1, le=65536, description="training examples per step, over all workers together"
    )
    pad: int = Field(default=0, ge=0, le=64, description="random crop after padding each side by so many pixels")
    pad_mode: Literal["reflect", "zero"] = Field(default="reflect", description="what the padding holds")
    flip: bool = Field(default=False, description="mirror half of the training images, left to right")
    validation: int | None = Field(
        default=None,
        ge=0,
        description="training examples held out by a seeded permutation (default: a tenth, at most 1000)",
    )
    limit: int | None = Field(
        default=None, ge=2, description="use only the first so many training examples, before holding any out"
    )
    device_resident: bool = Field(
        default=True, description="keep the training images in device memory; false copies each batch from the host"
    )

    @model_validator(mode="after")
    def _root_fits_name(self) -> DataSpec:
        if self.name == "digits" and self.root is not None:
            raise ValueError("digits comes with scikit-learn: remove root, or name another data set")
        if self.name != "digits" and self.root is None:
            raise ValueError(f"{self.name} is read from files: set root to their folder or to s3://bucket/prefix")
        return self


class Sizes(NamedTuple):
    """Examples in each split, the shape (C, H, W) of an image, the number of classes."""

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
    """The sizes after `limit` and `validation` if the set is the published one; None for a set of one's own."""
    if spec.name not in _PUBLISHED:
        return None
    stored, test, shape, classes = _PUBLISHED[spec.name]
    total = min(stored, spec.limit or stored)
    validation = num_validation(spec, total)
    return Sizes(max(total - validation, 0), validation, test, shape, classes)


def num_validation(spec: DataSpec, total: int) -> int:
    """How many of `total` training examples are held out."""
    return min(1000, total // 10) if spec.validation is None else spec.validation
