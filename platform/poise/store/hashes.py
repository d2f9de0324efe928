"""SHA-256 of local files, with a cache for large ones, which many runs read."""

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
"""Size in bytes from which the hash of a file is cached until its size or its time of modification changes."""


def cached_sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a local file.

    The hash of a large file is stored in the cache folder of this user, under its path, inode, size and time.
    """
    status = path.stat()
    if status.st_size < LARGE:
        return sha256_of(path)
    stamp = [str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    cache_file = _folder() / blake2b(json.dumps(stamp).encode(), digest_size=16).hexdigest()
    with suppress(OSError):
        if len(text := cache_file.read_text()) == 64:
            return text
    digest = sha256_of(path)
    with suppress(OSError):  # without a writable cache the file is hashed again next time
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache_file.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(cache_file)
    return digest


def _folder() -> Path:
    return Path(os.environ.get(env.CACHE) or Path.home() / ".cache" / "poise") / "sha256"
