"""One interface for a folder and for S3.

Everything above it relies on three promises: what `write`, `create` and `swap` make visible is complete; of several
racing `create` or `swap` calls on one key at most one succeeds; and what they have returned from survives a crash.
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

from poise.errors import DamagedError, PoiseError, StoreError, UserError

__all__ = ["RESERVED", "Entry", "Storage", "check_key", "explained", "open_storage", "scratch_folder", "sha256_of"]

RESERVED = ".poise-"
"""Names that begin so belong to the store itself (temporary and lock files): never listed, refused as keys."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|s3:", re.IGNORECASE)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FORMS = "write a folder, such as runs, or s3://bucket/prefix"


@dataclass(frozen=True, order=True)
class Entry:
    """One object: its key, its size in bytes, when it was last modified (epoch seconds, by the store's clock).

    `etag` is what the service says of the content; empty in a folder.
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
        """Create an object unless the key is taken; whether this call did it. Rivals must write differing bytes."""

    @abstractmethod
    def swap(self, key: str, data: bytes, expected: bytes) -> bool:
        """Replace an object if its bytes are `expected`; whether this call did it.

        It excludes other swaps only: a key that is swapped is never given to `write`, `append` or `delete`.
        """

    @abstractmethod
    def append(self, key: str, data: bytes) -> None:
        """Add bytes at the end of an object, which need not exist. For one writer at a time."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Every object whose key begins with `prefix`, sorted by key."""

    @abstractmethod
    def folders(self) -> Sequence[str]:
        """The first parts of all keys that have more than one, sorted."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; one that is already gone is not an error."""

    @abstractmethod
    def move(self, key: str, to: str) -> None:
        """Give an object another key, replacing what is there."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Copy a local file into the store, atomically and durably."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file (its folder is made), which is either complete or not there."""

    @abstractmethod
    def sweep(self, older_than_s: float, prefix: str = "") -> Sequence[str]:
        """Remove what writers that died left behind if older than this many seconds; names what was removed.

        Only below `prefix`, the path of a folder with a slash at its end: writers elsewhere may be alive.
        """

    @abstractmethod
    def check_exclusion(self) -> None:
        """`StoreError` if of several racing `create` or `swap` calls more than one could succeed here."""

    def sha256(self, key: str) -> str:
        """The hexadecimal SHA-256 of an object as it is stored now."""
        with scratch_folder() as folder:
            path = folder / "object"
            self.download(key, path)
            return sha256_of(path)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder on this machine; `StoreError` that names TMPDIR when its disk is full."""
    place = "the folder of temporary files"
    try:
        place = tempfile.gettempdir()
        with tempfile.TemporaryDirectory(prefix="poise-") as folder:
            yield Path(folder)
    except PoiseError:
        raise
    except Exception as error:
        code = getattr(error, "errno", None)
        unusable = isinstance(error, FileNotFoundError) and "temporary directory" in str(error)
        if not (unusable or code in _FULL or "No space left" in str(error)):  # safetensors raises no OSError
            raise
        raise StoreError(
            f"{place}: no space left for what is prepared there before it is stored ({error}): set TMPDIR to a folder "
            "on a disk with room, and run again; nothing that was committed is lost"
        ) from error


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_key(key: str) -> str:
    """Return `key` if it cannot lead out of the store on any backend, else raise `UserError`."""
    parts = key.split("/")
    sound = (
        key.isprintable()
        and "\\" not in key
        and len(key.encode(errors="replace")) <= 900
        and all(part not in ("", ".", "..") and not part.startswith(RESERVED) for part in parts)
        and all(len(part.encode(errors="replace")) <= 200 for part in parts)
    )
    if not sound:
        raise UserError(
            f"{key[:80]!r} cannot name an object in a store: write a relative path of non-empty parts separated by "
            f"'/', none of them '.' or '..' or beginning with {RESERVED!r}, of at most 200 bytes each and 900 in all"
        )
    return key


def open_storage(url: str | Path) -> Storage:
    """The storage at a folder (made when first written to) or at `s3://bucket/prefix`; `UserError` for anything else.

    A relative folder is resolved at once, since Ray workers change their working directory.
    """
    text = str(url)
    if not text.strip() or not text.isprintable():
        raise UserError(f"{text[:80]!r} is not a store: {_FORMS}")
    if isinstance(url, Path) or not (scheme := _SCHEME.match(text)):
        from poise.store.folder import FolderStorage

        return FolderStorage(Path(text).expanduser().absolute())
    if scheme[0].lower() != "s3://":
        raise UserError(f"a store cannot be reached by {scheme[0]!r}: {_FORMS}")
    from poise.store.s3 import S3Storage  # boto3 takes 0.4 s to import, and a folder does without

    return S3Storage(*_bucket_and_prefix(text))


def _bucket_and_prefix(url: str) -> tuple[str, str]:
    """Split an S3 address. What may hold a secret is refused without being repeated."""
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
    """Turn what the operating system refuses into a `StoreError` that says what to do; a missing file stays one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _UNREADABLE:
            raise DamagedError(f"{where}: the disk cannot read it ({error.strerror})") from error
        raise StoreError(f"{where}: {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in _FULL:
        return "no space left: free space and run again; nothing that was committed is lost"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"access refused ({error.strerror}): mend its permissions, or name another folder"
    return f"{error.strerror or error}"
