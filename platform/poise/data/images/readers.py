"""Parsers from the bytes of one file to arrays: idx, CIFAR binary, MATLAB, npz, and Parquet with encoded images.

Every reader takes bytes and returns images as (N, C, H, W) and labels as (N,), or raises one of `UNREADABLE`. No reader
unpickles anything.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

__all__ = [
    "UNREADABLE",
    "Arrays",
    "cifar_binary",
    "idx",
    "npz",
    "npz_labels",
    "parquet",
    "parquet_columns",
    "parquet_labels",
    "svhn",
]

Array = npt.NDArray[Any]
Arrays = tuple[Array, Array]

UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OSError,
    SyntaxError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    MatReadError,
    pa.ArrowException,
    Image.DecompressionBombError,
)
"""The exceptions that the libraries raise for malformed bytes."""

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("fine_label", "label")


def idx(data: bytes, dimensions: int) -> Array:
    """The uint8 array of a file in the idx format, gzipped or plain; `dimensions` is 3 for images, 1 for labels."""
    if data[:2] == b"\x1f\x8b":  # gzip's magic number
        data = gzip.decompress(data)
    magic = bytes([0, 0, 8, dimensions])  # 8: unsigned bytes
    if data[:4] != magic:
        raise ValueError(f"it begins with {data[:4].hex() or 'nothing'}, not with the idx magic {magic.hex()}")
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(f"it holds {len(data) - start} bytes where its header promises {math.prod(shape)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def cifar_binary(data: bytes, label_bytes: int) -> Arrays:
    """Images and labels of a binary batch of CIFAR-10 (`label_bytes` 1) or CIFAR-100 (`label_bytes` 2).

    CIFAR-100 stores the coarse label, then the fine one; the fine one is returned.
    """
    record = label_bytes + 3 * 32 * 32
    if not data or len(data) % record:
        raise ValueError(f"its {len(data)} bytes are not whole records of {record} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1]


def svhn(data: bytes) -> Arrays:
    """Images and labels of a cropped-digits file of SVHN: X (32, 32, 3, N), and y (N, 1) with 10 for the digit 0.

    The published files are compressed, so a checksum finds damage; SciPy's parser can crash on an uncompressed file
    whose tags are damaged.
    """
    content = loadmat(io.BytesIO(data), variable_names=["X", "y"])
    images = content["X"]
    labels = content["y"]
    if images.ndim != 4 or images.shape[2] != 3 or images.dtype != np.uint8:
        raise ValueError(f"X is {images.dtype} of shape {images.shape}, not uint8 of (height, width, 3, N)")
    if labels.size and not 1 <= labels.min() <= labels.max() <= 10:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, not from 1 to 10")
    return images.transpose(3, 2, 0, 1), np.where(labels == 10, 0, labels).reshape(-1)


def npz(data: bytes, part: str) -> Arrays:
    """`x_<part>` and `y_<part>` of an npz file.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C one of 1, 3, 4. An ambiguous shape is read as channels
    last.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as content:
        missing = [name for name in (f"x_{part}", f"y_{part}") if name not in content.files]
        if missing:
            raise ValueError(f"it holds no {' and no '.join(missing)}, only {content.files}")
        images = content[f"x_{part}"]
        labels = content[f"y_{part}"]
    return _channels_first(images), _squeeze_column(labels)


def npz_labels(data: bytes, part: str) -> Array:
    """`y_<part>` of an npz file, without its images."""
    with np.load(io.BytesIO(data), allow_pickle=False) as content:
        return _squeeze_column(content[f"y_{part}"])


def _squeeze_column(labels: Array) -> Array:
    """(N, 1) as (N,); other shapes as they are."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _channels_first(images: Array) -> Array:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3, 4):
        return images.transpose(0, 3, 1, 2)
    if images.ndim == 4 and images.shape[1] in (1, 3, 4):
        return images
    raise ValueError(f"images of shape {images.shape} are neither (N, H, W) nor (N, H, W, C) nor (N, C, H, W)")


def parquet(data: bytes, rows: Array | None = None) -> Arrays:
    """Images and labels of a Parquet file with encoded images (PNG, JPEG, ...); of all rows when `rows` is None.

    The image column is `image` or `img`, binary or a struct with a field `bytes`; the label column is `fine_label` or
    `label`, of integers. All images must have the size of the first one. They are grey if the first one is, else RGB.
    """
    file = _parquet_file(data)
    image_name, label_name = parquet_columns(file.schema_arrow)
    table = file.read(columns=[image_name, label_name])
    if rows is not None:
        table = table.take(pa.array(rows))
    labels = table[label_name]
    images = table[image_name]
    if pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")
    if images.null_count or labels.null_count:
        raise ValueError(f"{images.null_count} images and {labels.null_count} labels are missing")
    return _decode_all(images.to_pylist()), labels.to_numpy()


def parquet_labels(data: bytes) -> Array:
    """The labels of a Parquet file as in `parquet`, without its images."""
    file = _parquet_file(data)
    _, label_name = parquet_columns(file.schema_arrow)
    labels = file.read(columns=[label_name])[label_name]
    if labels.null_count:
        raise ValueError(f"{labels.null_count} labels are missing")
    return labels.to_numpy()  # type: ignore[no-any-return]


def parquet_columns(schema: pa.Schema) -> tuple[str, str]:
    """The names of the image and the label column; ValueError when one is missing or labels are no integers."""
    image_name = _column(schema.names, _IMAGE_COLUMNS)
    label_name = _column(schema.names, _LABEL_COLUMNS)
    label_type = schema.field(label_name).type
    if not pa.types.is_integer(label_type):
        raise ValueError(f"column {label_name!r} holds {label_type}, not integers")
    return image_name, label_name


def _parquet_file(data: bytes) -> pq.ParquetFile:
    return pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)


def _column(names: list[str], candidates: tuple[str, ...]) -> str:
    """The first of the candidates that is a column; ValueError when none is."""
    column = next((name for name in candidates if name in names), None)
    if column is None:
        raise ValueError(f"it has no column {' or '.join(map(repr, candidates))}, only {names}")
    return column


def _decode_all(encoded: list[bytes]) -> Array:
    """Pixels (N, C, H, W) of encoded images that are all of one size."""
    if not encoded:
        raise ValueError("it has no rows")
    is_grey = _decode(encoded[0], None, 0).ndim == 2  # the first image decides for all
    mode = "L" if is_grey else "RGB"
    images = [_decode(data, mode, row) for row, data in enumerate(encoded)]
    shape = images[0].shape
    for row, image in enumerate(images):
        if image.shape != shape:
            raise ValueError(f"row {row} is an image of {image.shape[:2]} pixels, row 0 of {shape[:2]}")
    stacked = np.stack(images)  # (N, H, W) or (N, H, W, 3)
    return stacked[:, None] if is_grey else stacked.transpose(0, 3, 1, 2)


def _decode(encoded: bytes, mode: str | None, row: int) -> Array:
    """Pixels (H, W) for mode L, (H, W, 3) for mode RGB; without a mode, L for a grey image and RGB for any other.

    `row` is the number of the image for the message of an error.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode[0] in "IF":  # 16 or 32 bits per pixel
                raise ValueError(f"its pixels ({image.mode}) do not fit 8 bits")
            default_mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            return np.asarray(image.convert(mode or default_mode))
    except UNREADABLE as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"row {row} cannot be decoded: {reason}") from error
