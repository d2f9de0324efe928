"""SHA-256 of local files that other runs read too: a large one is hashed once on a machine, until it changes."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from poise import env
from poise.store.storage import sha256_of

__all__ = ["LARGE", "cached_sha256"]

LARGE = 16 << 20
"""Bytes from which a file is hashed again only when its size or its time of modification has changed."""


def cached_sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a local file.

    That of a large file is remembered in the cache folder of this user, with the file's inode, size and time.
    """
    status = path.stat()
    if status.st_size < LARGE:
        return sha256_of(path)
    stamp = [str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    remembered = _folder() / blake2b(json.dumps(stamp).encode(), digest_size=16).hexdigest()
    with suppress(OSError):
        if len(text := remembered.read_text()) == 64:
            return text
    digest = sha256_of(path)
    with suppress(OSError):  # a home that cannot be written costs the time of hashing again, nothing else
        remembered.parent.mkdir(parents=True, exist_ok=True)
        temporary = remembered.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(remembered)
    return digest


def _folder() -> Path:
    return Path(os.environ.get(env.CACHE) or Path.home() / ".cache" / "poise") / "sha256"
