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
"""Error codes of file systems for operations that they do not support."""


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

    def compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
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

    def append(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with explained(str(path)):
            self._make_room(path)
            with path.open("ab") as file:
                file.write(data)
                _sync(file)
        return True

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
        source = self._path(key)
        target = self._path(to)
        with explained(str(target)):
            self._make_room(target)
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
        candidates = (self.root / _folder_of(prefix)).rglob(f"{RESERVED}*")
        removed = []
        with explained(self.url):
            for path in sorted(candidates):
                is_temporary = path.name.startswith((_TEMPORARY, _DISPLACED, CONTENDER))
                if is_temporary and path.lstat().st_mtime < before:
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
                    self._remove_empty(path.parent)
                    removed.append(path.relative_to(self.root).as_posix())
        return removed

    def check_exclusion(self) -> None:
        pass  # links and renames of a file system are atomic

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
        """Write an object through a temporary file that `fill` fills, atomically and durably."""
        path = self._path(key)
        with explained(str(path)), self._new_file(path) as (temporary, file):
            fill(file)
            _sync(file)
            os.replace(temporary, path)
            _sync_folder(path.parent)

    @contextmanager
    def _new_file(self, path: Path) -> Iterator[tuple[Path, BinaryIO]]:
        """A new hidden file beside `path`, to be renamed to it; see `_make_room`."""
        self._make_room(path)
        with _new_file(path.parent) as temporary_and_file:
            yield temporary_and_file

    def _make_room(self, path: Path) -> None:
        """Make the folder of `path`, so that an object can be written there.

        A folder at the path of an object, or a file at the path of a folder, is renamed to a hidden name beside it and
        keeps its content.
        """
        folders = [folder for folder in path.parents if folder != self.root and self.root in folder.parents]
        for folder in reversed(folders):
            if folder.exists() and not folder.is_dir():
                _displace(folder)
        self._make_root()
        _make_folder(path.parent)
        if path.is_dir():
            _displace(path)

    def _make_root(self) -> None:
        """Make the folder of the store unless it exists; StoreError if it cannot be made."""
        try:
            _make_folder(self.root)
        except OSError as error:
            raise StoreError(
                f"store: {self.url} cannot be made ({error.strerror}): name a folder that can be written"
            ) from error

    def _remove_empty(self, folder: Path) -> None:
        """Remove `folder` and its parents up to the root as long as they are empty: S3 has no empty folders either."""
        while folder != self.root:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


@contextmanager
def staged(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that is renamed to `path` at the end of the block, or removed if the block raises."""
    with _new_file(path.parent) as (temporary, file):
        yield file
        file.flush()
        os.replace(temporary, path)


@contextmanager
def _new_file(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield the path and handle of a new hidden file in `folder`, which is removed unless the block renames it."""
    path = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
    file = _open_new(path)
    try:
        with file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def _open_new(path: Path) -> BinaryIO:
    """Create a file and its folder; repeated if another process removes the folder while it is empty."""
    while True:
        with suppress(FileNotFoundError):
            _make_folder(path.parent)
            return path.open("xb")


def _displace(path: Path) -> None:
    """Rename a file or folder to a hidden name beside it."""
    with suppress(FileNotFoundError):
        os.rename(path, path.parent / f"{_DISPLACED}{uuid.uuid4().hex}-{path.name}"[:250])


def _link(temporary: Path, path: Path) -> bool:
    """Give a complete file its name unless the name is taken; returns whether this call did it."""
    try:
        os.link(temporary, path)  # unlike a rename, it fails when the name is taken
    except FileExistsError:
        return temporary.stat().st_nlink > 1  # NFS may repeat a link whose answer was lost: then this call made it
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        with alone_in(path.parent):  # a file system without hard links
            if path.exists():
                return False
            os.replace(temporary, path)
    return True


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, durably."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a change of names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # not every file system can sync a folder
            raise
    finally:
        os.close(descriptor)


def _folder_of(prefix: str) -> str:
    """The folder part of a prefix of keys; empty for the root."""
    folder = prefix.rpartition("/")[0]
    return check_key(folder) if folder else ""


def _walk(folder: Path, prefix: str, begins: str = "") -> Iterator[Entry]:
    """Every file below a folder, as an entry with `prefix` before its path.

    Skips names in `folder` that do not begin with `begins`, reserved names, and files that another process removes in
    the meantime.
    """
    try:
        with os.scandir(folder) as items:
            matches = [item for item in items if item.name.startswith(begins) and not item.name.startswith(RESERVED)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for item in matches:
        if item.is_dir():
            yield from _walk(folder / item.name, f"{prefix}{item.name}/")
        elif item.is_file():
            with suppress(FileNotFoundError):
                status = item.stat()
                yield Entry(prefix + item.name, status.st_size, status.st_mtime)
