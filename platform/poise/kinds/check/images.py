"""Checks of the image files that a spec names: folder, file names, columns or arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from poise.data.images.spec import DataSpec
from poise.errors import UserError
from poise.kinds.check.field_error import FieldError, absolute_path_hint

__all__ = ["image_errors"]


def image_errors(spec: DataSpec) -> Iterator[FieldError]:
    """What is wrong with the local folder of a data set of images."""
    if spec.root is None or "://" in spec.root:
        return
    root = Path(spec.root).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "is not there"
        cure = f"nothing is downloaded: put the files of {spec.name} there"
        yield FieldError(("root",), f"the folder {absolute_path_hint(root)} {what}; {cure}", absent=True)
        return
    if spec.name == "function":
        return  # which files there are, only the function knows
    from poise.data.images.files import image_files
    from poise.store.storage import open_storage

    storage = open_storage(spec.root)
    names = [entry.key for entry in storage.list("")]
    for split in ("train", "test"):
        try:
            files = image_files(spec, split, names, storage.url)
            _check_header(root / files[0], split)
        except (UserError, ValueError) as error:
            yield FieldError(("root",), str(error))
            return


def _check_header(file: Path, split: str) -> None:
    """Check the columns of a Parquet file or the array names of an npz file; the contents are not read.

    Raises:
        ValueError: the columns or arrays are not those that the reader needs, or the file cannot be read.
    """
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        from poise.data.images.readers import parquet_columns

        try:
            parquet_columns(pq.read_schema(file))
        except (ValueError, pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    if file.suffix == ".npz":
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        missing = [name for name in (f"x_{split}", f"y_{split}") if f"{name}.npy" not in names]
        if missing:
            present = ", ".join(name.removesuffix(".npy") for name in names)
            raise ValueError(f"{file} holds no {' and no '.join(missing)}, only {present}")
