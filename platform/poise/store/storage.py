"""The storage interface, for a folder and for S3.

Every storage guarantees three properties. `write`, `create` and `compare_and_swap` are atomic: readers see the whole
object or none. Of several racing `create` or `compare_and_swap` calls on one key at most one succeeds. Once a call has
returned, its object survives a crash.
"""

from __future__ import annotations

import errno
import hashlib
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from poise.errors import IntegrityError, PoiseError, StoreError, UserError

__all__ = ["RESERVED", "Entry", "Storage", "check_key", "explained", "open_storage", "scratch_folder", "sha256_of"]

RESERVED = ".poise-"
"""Prefix of the names of the store's own temporary and lock files. They are not listed, and not allowed in keys."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|s3:", re.IGNORECASE)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FORMS = "write a folder, such as runs, or s3://bucket/prefix"


@dataclass(frozen=True, order=True)
class Entry:
    """One object: its key, its size in bytes and its time of modification (epoch seconds, by the store's clock).

    `etag` is the service's identifier of the content; empty in a folder.
    """

    key: str
    size: int
    modified: float
    etag: str = ""


class Storage(ABC):
    """Objects by key below `url`. A key is relative, with parts separated by '/' (see `check_key`).

    Every method raises `StoreError` when the store cannot be used and `UserError` for a malformed key.
    """

    url: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The bytes of an object; `FileNotFoundError` when there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object, atomically and durably."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Create an object unless the key exists; returns whether this call did. Competing writers must write different
        bytes."""

    @abstractmethod
    def compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        """Replace an object if its bytes are `expected`; returns whether this call did.

        Atomic only with respect to other swaps: never use `write`, `append` or `delete` on such a key.
        """

    @abstractmethod
    def append(self, key: str, data: bytes) -> bool:
        """Append bytes to an object, which is created if it does not exist. For one writer at a time.

        Returns False, and writes nothing, where the service can only replace whole objects.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Every object whose key begins with `prefix`, sorted by key."""

    @abstractmethod
    def folders(self) -> Sequence[str]:
        """The first parts of all keys that have more than one, sorted."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that does not exist is not an error."""

    @abstractmethod
    def move(self, key: str, to: str) -> None:
        """Rename an object, replacing the object at `to`."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Copy a local file into the store, atomically and durably."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, atomically; its folder is made."""

    @abstractmethod
    def sweep(self, older_than_s: float, prefix: str = "") -> Sequence[str]:
        """Remove temporary files and uploads of dead writers that are older than `older_than_s`; returns their names.

        `prefix`, the path of a folder with a slash at its end, restricts it to that folder.
        """

    @abstractmethod
    def check_exclusion(self) -> None:
        """`StoreError` if the service does not make `create` and `compare_and_swap` exclusive."""

    def sha256(self, key: str) -> str:
        """The hexadecimal SHA-256 of an object, read now."""
        with scratch_folder() as folder:
            path = folder / "object"
            self.download(key, path)
            return sha256_of(path)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder on this machine; `StoreError` that names TMPDIR when its disk is full."""
    parent = "the folder of temporary files"
    try:
        parent = tempfile.gettempdir()
        with tempfile.TemporaryDirectory(prefix="poise-") as folder:
            yield Path(folder)
    except PoiseError:
        raise
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError) and "temporary directory" in str(error)
        # The errors of safetensors are no OSErrors and have no code.
        is_full = getattr(error, "errno", None) in _FULL or "No space left" in str(error)
        if not (is_missing or is_full):
            raise
        raise StoreError(
            f"{parent}: no space left for files that are prepared there before they are stored ({error}): set TMPDIR "
            "to a folder on a disk with room, and run again; nothing that was committed is lost"
        ) from error


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_key(key: str) -> str:
    """Return `key` if it is valid on every backend and stays within the store, else raise `UserError`."""
    parts = key.split("/")
    is_valid = (
        key.isprintable()
        and "\\" not in key
        and len(key.encode(errors="replace")) <= 900
        and all(part not in ("", ".", "..") and not part.startswith(RESERVED) for part in parts)
        and all(len(part.encode(errors="replace")) <= 200 for part in parts)
    )
    if not is_valid:
        raise UserError(
            f"{key[:80]!r} cannot name an object in a store: write a relative path of non-empty parts separated by "
            f"'/', none of them '.' or '..' or beginning with {RESERVED!r}, of at most 200 bytes each and 900 in all"
        )
    return key


def open_storage(url: str | Path) -> Storage:
    """The storage at a folder (made by the first write) or at `s3://bucket/prefix`; `UserError` for any other URL.

    A relative path is made absolute at once, since Ray workers change their working directory.
    """
    text = str(url)
    if not text.strip() or not text.isprintable():
        raise UserError(f"{text[:80]!r} is not a store: {_FORMS}")
    if isinstance(url, Path) or not (scheme := _SCHEME.match(text)):
        from poise.store.folder import FolderStorage

        return FolderStorage(Path(text).expanduser().absolute())
    if scheme[0].lower() != "s3://":
        raise UserError(f"a store cannot be reached by {scheme[0]!r}: {_FORMS}")
    from poise.store.s3 import S3Storage  # imported here: boto3 takes 0.4 s, and a folder does not need it

    return S3Storage(*_bucket_and_prefix(text))


def _bucket_and_prefix(url: str) -> tuple[str, str]:
    """Bucket and prefix of an S3 URL; `UserError` for a malformed one, without parts of it that may be secret."""
    bucket, _, prefix = url[len("s3://") :].partition("/")
    if any(sign in url for sign in "@?#"):
        raise UserError(
            "an s3:// address holds a bucket and a prefix only (no '@', '?' or '#'): credentials and the endpoint are "
            "read from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL in the environment"
        )
    if not _BUCKET.fullmatch(bucket):
        raise UserError(f"{bucket[:80]!r} is not the name of a bucket: write s3://bucket/prefix")
    prefix = prefix.removesuffix("/")
    return bucket, check_key(prefix) if prefix else ""


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn an OSError of the block into a `StoreError` with a remedy; a FileNotFoundError is raised as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _UNREADABLE:
            raise IntegrityError(f"{where}: the disk cannot read it ({error.strerror})") from error
        raise StoreError(f"{where}: {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    """What failed and what to do about it."""
    if error.errno in _FULL:
        return "no space left: free space and run again; nothing that was committed is lost"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"access refused ({error.strerror}): mend its permissions, or name another folder"
    return f"{error.strerror or error}"
