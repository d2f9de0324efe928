"""A store in a folder, local or shared by the nodes of a cluster."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from poise.errors import StoreError
from poise.store.folder_lock import CONTENDER, alone_in
from poise.store.storage import RESERVED, Entry, Storage, check_key, explained

__all__ = ["FolderStorage", "staged"]

_TEMPORARY = f"{RESERVED}tmp-"
_DISPLACED = f"{RESERVED}displaced-"
_UNSUPPORTED = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
"""What file systems answer to a call that they do not have."""


class FolderStorage(Storage):
    """Each object is a file below `root`, an absolute path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, key: str) -> bytes:
        with explained(f"{self.url}/{key}"), self._open(key) as file:
            return file.read()

    def write(self, key: str, data: bytes) -> None:
        self._publish(key, lambda file: file.write(data))

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if path.is_file():
            return False
        with explained(str(path)), self._new_file(path) as (temporary, file):
            file.write(data)
            _sync(file)
            if not _link(temporary, path):
                return False
            _sync_folder(path.parent)
        return True

    def swap(self, key: str, data: bytes, expected: bytes) -> bool:
        path = self._path(key)
        try:
            with explained(str(path)):
                if self.read(key) != expected:
                    return False
                with alone_in(path.parent):
                    if self.read(key) != expected:
                        return False
                    self.write(key, data)
        except FileNotFoundError:
            return False
        return True

    def append(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with explained(str(path)):
            self._make_way(path)
            with path.open("ab") as file:
                file.write(data)
                _sync(file)

    def list(self, prefix: str = "") -> list[Entry]:
        folder = _folder_of(prefix)
        with explained(self.url):
            parent = f"{folder}/" if folder else ""
            return sorted(_walk(self.root / folder, parent, begins=prefix.removeprefix(parent)))

    def folders(self) -> Sequence[str]:
        if not self.root.is_dir():
            return []
        with explained(self.url), os.scandir(self.root) as items:
            return sorted(item.name for item in items if item.is_dir() and not item.name.startswith(RESERVED))

    def delete(self, keys: Sequence[str]) -> None:
        for path in map(self._path, keys):
            with explained(str(path)):
                path.unlink(missing_ok=True)
        for folder in {self._path(key).parent for key in keys}:
            if folder.is_dir():
                _sync_folder(folder)
            self._remove_empty(folder)

    def move(self, key: str, to: str) -> None:
        source, target = self._path(key), self._path(to)
        with explained(str(target)):
            self._make_way(target)
            os.replace(source, target)
            _sync_folder(target.parent)
        self._remove_empty(source.parent)

    def upload(self, path: Path, key: str) -> None:
        with path.open("rb") as source:
            self._publish(key, lambda file: shutil.copyfileobj(source, file, 1 << 20))

    def download(self, key: str, path: Path) -> None:
        with explained(str(path)), self._open(key) as source, staged(path) as file:
            shutil.copyfileobj(source, file, 1 << 20)

    def sweep(self, older_than_s: float, prefix: str = "") -> Sequence[str]:
        before = time.time() - older_than_s
        found = (self.root / _folder_of(prefix)).rglob(f"{RESERVED}*")
        removed = []
        with explained(self.url):
            for path in sorted(found):
                if path.name.startswith((_TEMPORARY, _DISPLACED, CONTENDER)) and path.lstat().st_mtime < before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                    self._remove_empty(path.parent)
                    removed.append(path.relative_to(self.root).as_posix())
        return removed

    def check_exclusion(self) -> None:
        pass  # links and renames of a file system exclude each other

    def sha256(self, key: str) -> str:
        with explained(f"{self.url}/{key}"), self._open(key) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _open(self, key: str) -> BufferedReader:
        path = self._path(key)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        return path.open("rb")

    def _publish(self, key: str, fill: Callable[[BinaryIO], object]) -> None:
        path = self._path(key)
        with explained(str(path)), self._new_file(path) as (temporary, file):
            fill(file)
            _sync(file)
            os.replace(temporary, path)
            _sync_folder(path.parent)

    @contextmanager
    def _new_file(self, path: Path) -> Iterator[tuple[Path, BinaryIO]]:
        """A new hidden file beside `path`, where nothing stands in the way of an object of that name."""
        self._make_way(path)
        with _new_file(path.parent) as temporary_and_file:
            yield temporary_and_file

    def _make_way(self, path: Path) -> None:
        """Make the folder of `path`. A folder in the place of an object, or a file in that of a folder, is set aside.

        It keeps what it holds, under a hidden name beside the place that it had.
        """
        folders = [folder for folder in path.parents if folder != self.root and self.root in folder.parents]
        for place in reversed(folders):
            if place.exists() and not place.is_dir():
                _displace(place)
        self._make_root()
        _make_folder(path.parent)
        if path.is_dir():
            _displace(path)

    def _make_root(self) -> None:
        """StoreError where the folder of the store is not there and cannot be made."""
        try:
            _make_folder(self.root)
        except OSError as error:
            raise StoreError(
                f"store: {self.url} cannot be made ({error.strerror}): name a folder that can be written"
            ) from error

    def _remove_empty(self, folder: Path) -> None:
        """Remove folders that hold nothing any more, as S3 has none either."""
        while folder != self.root:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


@contextmanager
def staged(path: Path) -> Iterator[BinaryIO]:
    """A file to fill that becomes `path` at the end of the block, or leaves nothing if the block raises."""
    with _new_file(path.parent) as (temporary, file):
        yield file
        file.flush()
        os.replace(temporary, path)


@contextmanager
def _new_file(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new hidden file in `folder`, gone at the end of the block unless the block renamed it."""
    path = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
    file = _open_new(path)
    try:
        with file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def _open_new(path: Path) -> BinaryIO:
    while True:
        with suppress(FileNotFoundError):  # another process may remove the folder while it is empty
            _make_folder(path.parent)
            return path.open("xb")


def _displace(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.rename(path, path.parent / f"{_DISPLACED}{uuid.uuid4().hex}-{path.name}"[:250])


def _link(temporary: Path, path: Path) -> bool:
    """Give a whole file its name unless that is taken; whether this call did it."""
    try:
        os.link(temporary, path)  # unlike a rename, it fails when the name is taken
    except FileExistsError:
        return temporary.stat().st_nlink > 1  # NFS may repeat a link whose answer was lost
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        with alone_in(path.parent):  # a file system without hard links
            if path.exists():
                return False
            os.replace(temporary, path)
    return True


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # not every file system can sync a folder
            raise
    finally:
        os.close(descriptor)


def _folder_of(prefix: str) -> str:
    folder = prefix.rpartition("/")[0]
    return check_key(folder) if folder else ""


def _walk(folder: Path, prefix: str, begins: str = "") -> Iterator[Entry]:
    """Every file below a folder; of the folder itself only what `begins` so, as the rest is not worth a look."""
    try:
        with os.scandir(folder) as items:
            names = [item for item in items if item.name.startswith(begins) and not item.name.startswith(RESERVED)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for item in names:
        if item.is_dir():
            yield from _walk(folder / item.name, f"{prefix}{item.name}/")
        elif item.is_file():
            with suppress(FileNotFoundError):  # removed in between
                status = item.stat()
                yield Entry(prefix + item.name, status.st_size, status.st_mtime)
