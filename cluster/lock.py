"""Write a lock file: every package of this environment but poise, and torch, which has a build per accelerator."""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

LEFT_OUT = {"pip", "poise", "torch", "torchaudio", "torchcodec", "torchvision"}
"""The last three are declared by vllm, needed by nothing here, and have no build that fits a CPU build of torch."""


def main(target: str, purpose: str, *others: str) -> None:
    known = {line for other in others for line in Path(other).read_text().splitlines()}
    found = {f"{dist.name}=={dist.version}" for dist in distributions() if dist.name.lower() not in LEFT_OUT}
    head = (
        f"# Every package of {purpose}, pinned. Install torch first, then this with --no-deps. `make lock` rewrites it."
    )
    Path(target).write_text("\n".join([head, *sorted(found - known, key=str.lower)]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
