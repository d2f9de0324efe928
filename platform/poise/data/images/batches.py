"""The data of a run: its splits, and a training stream with random access by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poise.data.images.augmentation import Draws, PadMode, crop_and_flip, draw
from poise.data.images.datasets import ImageSet, read, read_part, to_float
from poise.data.images.spec import DataSpec
from poise.data.order import GlobalBatches, hold_out
from poise.data.validation import num_validation
from poise.errors import UserError
from poise.spec.seeds import derive_seed

__all__ = ["Batches", "Dataset", "Split", "load", "load_split", "training_batches"]


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits; `mean` and `std` are per channel, over the pixels of `train` scaled to [0, 1]."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Split:
    """One split of a data set, and the number of classes of the whole data set."""

    images: ImageSet
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.images.shape[1:]
        return channels, height, width


def load(spec: DataSpec, seed: int) -> Dataset:
    """Read a data set and hold out its validation split by a permutation that `seed` draws.

    A channel that is constant over the whole training split gets std 1.

    Raises:
        UserError: files cannot be read (see `datasets.read`), or no training example remains.
        StoreError: a folder or a bucket cannot be read.
    """
    stored, test, classes = read(spec)
    train, validation = _hold_out(stored, spec, seed)
    mean, std = _statistics(train.images)
    return Dataset(train, validation, test, classes, mean, std)


def load_split(spec: DataSpec, seed: int, name: Literal["train", "validation", "test"]) -> Split:
    """One split of what `load` returns. Only images of the part that holds it, train or test, are decoded.

    Raises:
        UserError, StoreError: as `load`.
    """
    if name == "test":
        return Split(*read_part(spec, "test"))
    stored, classes = read_part(spec, "train")
    train, validation = _hold_out(stored, spec, seed)
    return Split(train if name == "train" else validation, classes)


def _hold_out(stored: ImageSet, spec: DataSpec, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and validation split, both in the order of the stored set."""
    train_rows, validation_rows = hold_out(len(stored), num_validation(spec.validation, len(stored)), seed)
    return stored.select(train_rows), stored.select(validation_rows)


class Batches:
    """The training stream, with random access: `batch(step)` is a pure function of the arguments and the step.

    The order of the images is that of `GlobalBatches`. Augmentation is drawn for the global batch and then cut into
    equal slices too, so that all ranks together see what a single worker would see.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int,
        pad: int = 0,
        pad_mode: PadMode = "reflect",
        flip: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        resident: bool = True,
    ) -> None:
        """images: (N, C, H, W), labels: (N,), both as in `ImageSet`; `batch_size` is the sum over all ranks.

        `resident` moves the set to the device if it takes at most half of the free memory there.

        Raises:
            UserError: fewer examples than one batch, a batch that the ranks cannot share equally, too wide a padding.
        """
        if pad >= min(images.shape[2:]):
            raise UserError(f"data.pad: {pad} pixels must be less than the side of the images, {min(images.shape[2:])}")
        self.device = torch.device(device)
        storage_device = self.device if resident and _fits(images, self.device) else torch.device("cpu")
        self.images = images.to(storage_device)
        self.labels = labels.to(storage_device)
        self._global = GlobalBatches(
            len(images), batch_size, seed, rank, world_size, key="data.batch_size", device=storage_device
        )
        self.steps_per_epoch = self._global.per_epoch
        self._seed = seed
        self._pad = pad
        self._pad_mode = pad_mode
        self._flip = flip

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's share of global batch `step` (from 0): x (n, C, H, W) float32 in [0, 1] and y (n,) int64."""
        rows = self._global.rows(step)[self._global.share]  # (n,)
        x = self.images[rows].to(self.device)
        y = self.labels[rows].to(self.device)
        if self._pad or self._flip:
            x = crop_and_flip(x, self._draws(step), pad=self._pad, mode=self._pad_mode)
        return to_float(x), y

    def _draws(self, step: int) -> Draws:
        """This rank's share of the crops and flips, which are drawn for the global batch."""
        seed = derive_seed(self._seed, "augment", step)
        draws = draw(self._global.batch_size, pad=self._pad, flip=self._flip, seed=seed)
        return Draws(*(values[self._global.share].to(self.device) for values in draws))


def training_batches(
    data: Dataset, spec: DataSpec, seed: int, rank: int, world_size: int, device: torch.device
) -> Batches:
    """The training stream of the `data` section for one of `world_size` ranks."""
    return Batches(
        data.train.images,
        data.train.labels,
        batch_size=spec.batch_size,
        seed=seed,
        pad=spec.pad,
        pad_mode=spec.pad_mode,
        flip=spec.flip,
        rank=rank,
        world_size=world_size,
        device=device,
        resident=spec.device_resident,
    )


def _fits(images: Tensor, device: torch.device) -> bool:
    """Whether images take at most half of the free memory of a GPU; always true of other devices."""
    if device.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return 2 * images.nbytes <= free_bytes


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population std per channel, in units of [0, 1].

    Sums are in float64, which is exact for uint8, over 2048 images at a time to bound memory.
    """
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)  # (2, C): sums of pixels and of their squares
    for part in torch.split(images, 2048):
        pixels = part.double()
        total += torch.stack([pixels.sum(dim=(0, 2, 3)), pixels.square().sum(dim=(0, 2, 3))])
    scale = 255 if images.dtype == torch.uint8 else 1
    mean, mean_square = total / (images.numel() / images.shape[1])
    std = (mean_square - mean.square()).clamp(min=0).sqrt()  # rounding may make the variance slightly negative
    std[std < 1e-6 * scale] = scale  # a constant channel: dividing by 1 leaves it as it is
    return tuple((mean / scale).tolist()), tuple((std / scale).tolist())
