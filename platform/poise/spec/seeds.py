"""Seeds for single purposes, derived from the seed of the run."""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for the purpose that `parts` name, such as `derive_seed(seed, "augment", step)`.

    A pure function of its arguments, by a hash: neighbouring seeds or steps give unrelated streams, which `seed + step`
    would not.
    """
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1
