"""What a result depended on besides its spec: versions, the commit of the code, the kind of machine.

No environment variable, host name, user name or path is recorded: the page of a run may be shown to anyone.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import poise
from poise import env

__all__ = ["environment"]

PACKAGES = (
    "boto3",
    "matplotlib",
    "numpy",
    "pyarrow",
    "pydantic",
    "ray",
    "safetensors",
    "scikit-learn",
    "scipy",
    "torch",
)


def environment() -> dict[str, Any]:
    """JSON-able facts: python, poise, git {commit, dirty} | None, packages, platform, cpus, torch.

    `torch` (threads, CUDA version, device names) is None unless torch was imported already: asking must not cost its
    import. `cpus` counts what this process may use.
    """
    return {
        "python": platform.python_version(),
        "poise": poise.__version__,
        "git": _git(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": _torch(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Of the tree that holds the package, or else of the working directory, or else what the sender of the job said."""
    for folder in (Path(poise.__file__).parent, Path.cwd()):
        commit = _run_git(folder, "rev-parse", "HEAD")
        if commit:
            changes = _run_git(folder, "status", "--porcelain", "--untracked-files=no")
            return {"commit": commit, "dirty": None if changes is None else bool(changes)}
    sent: dict[str, Any] | None = json.loads(os.environ.get(env.COMMIT, "null"))
    return sent


def _run_git(folder: Path, *arguments: str) -> str | None:
    """The output, or None where there is no git, no repository or no answer in time."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _torch() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"threads": torch.get_num_threads(), "cuda": torch.version.cuda, "devices": devices}
