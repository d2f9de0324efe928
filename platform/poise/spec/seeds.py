"""One seed per purpose, derived from the run's seed."""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for the purpose that `parts` name, such as `derive_seed(seed, "augment", step)`.

    A pure function of its arguments, well mixed: seeds or steps that are neighbours give unrelated streams, which
    `seed + step` does not.
    """
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1
